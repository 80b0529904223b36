"""Peak bfloat16 rates of accelerators, the denominator of MFU: matrix units, dense (without 2:4 sparsity), per JAX device.

Sources: the specification tables of Cloud TPU's pages (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; a JAX device is one chip on
all of them) and NVIDIA's public data sheets and white papers: A100 (datasheet 2021), H100 (SXM, PCIe and NVL columns), H200
(SXM and NVL), L4, L40S, A10, GeForce RTX 3090 and 4090 (GA102 and AD102 white papers, tensor rate with float32 accumulation), HGX
B200. Data sheets that only give the rate with sparsity are halved, as their footnotes say.
"""

import re

_TERA = 10**12
# pattern of the whole jax.Device.device_kind -> TFLOP/s; slices of a GPU (MIG) have other names and no entry
_PEAKS = {
    r"TPU v4": 275,
    r"TPU v5 lite|TPU v5e": 197,
    r"TPU v5p?": 459,
    r"TPU v6 lite|TPU v6e": 918,
    r"NVIDIA A100(-\S+| 80GB PCIe)": 312,
    r"NVIDIA H100 PCIe": 756,
    r"NVIDIA H100 NVL": 835,
    r"NVIDIA H100 80GB HBM3": 989,
    r"NVIDIA H200 NVL": 835,
    r"NVIDIA H200": 989,
    r"NVIDIA B200": 2250,
    r"NVIDIA L4": 121,
    r"NVIDIA L40S": 362,
    r"NVIDIA A10": 125,
    r"NVIDIA GeForce RTX 3090": 71,
    r"NVIDIA GeForce RTX 4090": 165,
}


def peak_flops(device_kind: str) -> int | None:
    """bfloat16 FLOP/s of a device by the name JAX gives it; None when it is not known."""
    return next((rate * _TERA for pattern, rate in _PEAKS.items() if re.fullmatch(pattern, device_kind)), None)
