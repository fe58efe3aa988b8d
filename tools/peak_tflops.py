"""What GPUs can do at most, as their makers say."""

from __future__ import annotations

import re

# Dense bf16, from NVIDIA's data sheets; the first row counts whose words are all in the device's name.
BF16_PEAK_TFLOPS = (
    ("A100", 312.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("B200", 2250.0),
)


def known_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU, None for one that is not in the table."""
    words = set(re.findall(r"\w+", device_name))
    return next((peak for chip, peak in BF16_PEAK_TFLOPS if words.issuperset(chip.split())), None)
