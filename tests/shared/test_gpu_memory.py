from shared.gpu_memory import ALLOCATOR, grow_segments


def test_what_was_set_stays() -> None:
    environ: dict[str, str] = {}
    grow_segments(environ)
    assert environ == ALLOCATOR
    own = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    grow_segments(own)
    assert own == {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
