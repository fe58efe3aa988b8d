"""Tensors through buckets of bytes come out as they went in."""

import torch

from gspo_moe.rollout.servers.buckets import buckets, empty_bucket, head_of, views


def test_tensors_of_all_shapes_and_dtypes_come_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (), (2, 3, 4), (100,), (1, 1)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    tensors = {
        str(n): torch.randn(shape).to(dtype) for n, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    found: dict[str, torch.Tensor] = {}
    for heads, bucket in buckets(tensors.items(), max_bytes=90):
        assert bucket.numel() <= 90 or len(heads) == 1
        received = empty_bucket(heads, torch.device("cpu")).copy_(bucket)
        found |= zip([head.name for head in heads], views(received, heads), strict=True)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_bucket_is_as_sglang_flattens_one() -> None:
    # FlattenedTensorBucket: the bytes of each tensor, flattened, one behind the other.
    tensors = [("a", torch.arange(6.0).view(2, 3).t()), ("b", torch.tensor([1.5]))]
    ((heads, bucket),) = buckets(tensors, max_bytes=10**6)
    assert bytes(bucket.tolist()) == b"".join(tensor.contiguous().numpy().tobytes() for _, tensor in tensors)
    assert [(head.name, head.dtype, head.shape) for head in heads] == [
        ("a", "float32", (3, 2)),
        ("b", "float32", (1,)),
    ]
    assert sum(head.nbytes for head in heads) == bucket.numel()
    assert head_of("a", tensors[0][1]) == heads[0]
