"""Every decoder family of transformers, as small as its configuration allows."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 99
LENGTH = 96
WINDOW = 16

# The first pattern that a number's name matches says how small it becomes.
_SMALL: tuple[tuple[str, int], ...] = (
    (r"vocab_size_per_layer|^vocab_size$|decoder_vocab_size|unpadded_vocab", VOCABULARY),
    (r"max_position|n_positions|max_seq_len|max_target_pos|n_ctx|context_length|model_max_length", LENGTH),
    (r"index_topk$", WINDOW),
    (r"^num_key_value_heads|^num_kv_heads|num_key_value", 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"experts_per_tok|moe_k$|topk$|top_k|moe_topk|cross_attn_k", 2),
    (r"expert_group|n_group|topk_group|o_groups|mamba_ngroups|groups$|num_query_groups", 1),
    (r"experts", 4),
    (r"(num|n)_.*heads|^attention_heads|_attention_heads$|n_head$|swa_num", 4),
    (r"^(num_|n_|decoder_|encoder_)?(hidden_)?layers?$|num_(decoder|encoder)_layers|num_blocks|layers_per_stack", 2),
    (r"sliding_window$|window|chunk|local_attention|index_block", WINDOW),
    (r"head_?dim|d_head|head_size|dim_head|d_kv|kv_channels|mamba_headdim|rotary_dim|_d_ssm", 8),
    (r"lora_rank|rank$|lowrank|d_rel|state_size|d_state", 8),
    (r"intermediate|ffn|d_ff$|dim_ff|dff|feed_forward|n_inner|d_inner", 48),
    (r"hidden_size|embd|d_model|emb_dim|embed_dim|^dim$|embedding_size|embedding_dim|embed_proj|lru_width|attention_hidden",
     32),
)
# What the patterns miss.
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LINEAR, "bamba": {"attn_layer_indices": [1]}, "granitemoehybrid": _LINEAR,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2}, "kimi_linear": _LINEAR,
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5": _LINEAR, "qwen3_5_text": _LINEAR, "qwen3_5_moe": _LINEAR, "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": _LINEAR, "qwen4_exp": _LINEAR, "qwen4_exp_text": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
              "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4, "attention_head_dim": 16,
              "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2, "mamba_headdim": 8,
               "attention_hidden_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1}, "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8,
                                                                            "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8}, "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
              "n_shared_experts": 1},
    "longcat_flash": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    "mimo_v2_flash": {"num_key_value_heads": 4, "swa_num_key_value_heads": 4},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 16},
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 16}, "xlm": {"causal": True}, "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
}


def small_numbers(config: Any) -> dict[str, Any]:
    """The large numbers of a configuration, made small."""
    out: dict[str, Any] = {}
    ids = 3
    for name, value in vars(config).items():
        if name.startswith("_") or isinstance(value, bool) or not isinstance(value, int):
            continue
        if re.search(r"(_id|_index|_token_id)$", name) and value >= 0:
            first = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
            out[name] = first.get(name, ids)
            ids += name not in first
            continue
        for pattern, small in _SMALL:
            if re.search(pattern, name) and value > 0:
                out[name] = min(value, small) if "max_pos" not in name else small
                break
    return out


def small_model(family: str, auto: Any = transformers.AutoModelForCausalLM, **own: Any) -> Any:
    """A model of the family with random weights, none of them zero; raises whatever transformers does."""
    cls = transformers.CONFIG_MAPPING[family]
    default = cls()
    numbers = small_numbers(default)
    for name in getattr(cls, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None and name in ("text_config", "decoder", "llm_config"):
            numbers[name] = {**small_numbers(part), **_OWN.get(part.model_type, {})}
    if hasattr(default, "is_decoder"):
        numbers["is_decoder"] = True
    config = cls(**{**numbers, **_OWN.get(family, {}), **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError where the block takes longer: some families are large whatever their configuration says."""
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Letters:
    """A tokenizer whose ids are letters'; nothing comes before or after a text."""

    bos_token_id, eos_token_id, all_special_ids = 1, 2, (0, 1, 2)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) % 60 + 20 for c in text] for text in texts]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(48 + i) for i in ids)


def rows(seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prefixes that share beginnings, shorter and longer than a window, and continuations of one to three tokens."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(20, 80) for _ in range(n)]

    starts = [ids(12), ids(25), ids(3)]
    heads = [[*start, *ids(n)] for start, lengths in zip(starts, [(1, 4, 9, 20), (2, 3, 16), (1, 2)], strict=True)
             for n in lengths] + [ids(7)]
    return heads, [[ids(1), ids(3), ids(2)] if n % 2 else [ids(1), ids(1)] for n in range(len(heads))]


def alone(model: Any, heads: list[list[int]], tails: list[list[list[int]]]) -> list[list[float]]:
    """The plain loop: each prefix with each continuation by itself."""
    out = []
    with torch.no_grad():
        for head, row in zip(heads, tails, strict=True):
            out.append([])
            for tail in row:
                log_probs = torch.log_softmax(model(torch.tensor([[*head, *tail[:-1]]])).logits[0].double(), -1)
                out[-1].append(sum(float(log_probs[len(head) - 1 + k, t]) for k, t in enumerate(tail)))
    return out


def deviation(a: list[list[float]], b: list[list[float]]) -> float:
    """The largest difference of scores."""
    return float(max(np.abs(np.subtract(x, y)).max() for x, y in zip(a, b, strict=True)))
