"""Small models with random weights: a Llama of characters, and a LLaVA that reads pictures beside them."""

from __future__ import annotations

from typing import Any

TEMPLATE = ("{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}IMAGE"
            "{% else %}{{ p.text }}{% endif %}{% endfor %}{{ '</s>\n' if m.role == 'assistant' else '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")


def letters_tokenizer() -> Any:
    """A tokenizer whose tokens are the single characters of ASCII, so that every text has tokens."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(c): c - 29 for c in range(32, 127)},
                                       "\n": 98}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # type: ignore[assignment]
    made.decoder = decoders.Fuse()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>",
                                                eos_token="</s>")


def letters_model() -> tuple[Any, Any]:
    """A Llama with random weights and :func:`letters_tokenizer`."""
    import torch
    import transformers

    tokenizer = letters_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2))
    return model.eval(), tokenizer


def picture_tokenizer(*tokens: str) -> Any:
    """:func:`letters_tokenizer` with further special tokens."""
    made = letters_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(tokens)})
    return made


def toy_llava(seed: int = 0) -> tuple[Any, Any]:
    """A LLaVA of 16 x 16 pixels and two layers, and its processor; a picture is four tokens."""
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = picture_tokenizer("<image>")
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    vision = transformers.CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                                           num_attention_heads=2, image_size=16, patch_size=8, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")))
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE.replace("IMAGE", "<image>"),
        num_additional_image_tokens=1)
    return model.eval(), processor


def toy_qwen() -> tuple[Any, Any]:
    """A Qwen2-VL and its processor: pictures take as many tokens as they have patches, positions have three axes."""
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = picture_tokenizer(*special)
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   tokenizer.convert_tokens_to_ids(list(special)), strict=True))
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "bos_token_id": 1,
            "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                                   "rope_theta": 10000.0}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
            text_config=text, vision_config=vision, **ids))
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    # what its constructor wants of videos needs torchvision
    processor = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    pictures = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    processor.image_processor, processor.tokenizer = pictures, tokenizer
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = ids["image_token_id"], ids["video_token_id"]
    processor.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return model.eval(), processor


__all__ = ["TEMPLATE", "letters_model", "letters_tokenizer", "picture_tokenizer", "toy_llava",
           "toy_qwen"]
