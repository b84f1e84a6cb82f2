"""MInference passes the conformance kit, with all three patterns at work and with the pattern of no search."""

from looseleaf.testing import check_attention_backend
from looseleaf_minference import MInference

HEADS = [["a_shape", 20, 40], ["vertical_slash", 40, 60], ["block_sparse", 5, 0], ["vertical_slash", 64, 50]]


def test_conformance() -> None:
    config = {layer: dict(enumerate(HEADS)) for layer in range(2)}
    check_attention_backend(MInference, lambda: MInference(
        config=config, min_length=48, block_size=16, last_q=16, forced_offsets=20))


def test_conformance_without_a_configuration() -> None:
    check_attention_backend(MInference, lambda: MInference(min_length=48))
