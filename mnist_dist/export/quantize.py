"""Quantizes an ONNX file to int8: tries several approaches and keeps the first that is accurate and small enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mnist_dist.errors import RunError
from mnist_dist.export.onnx import onnx_session, slim_onnx
from mnist_dist.export.verify import Form

LARGEST_LOSS = 0.1
"""Largest difference in accuracy between an int8 file and the network, up or down, in percentage points."""

LARGEST_SHARE = 0.35
"""Largest size of an int8 file, as a share of the fp32 ONNX file's size."""

CALIBRATION_IMAGES = 512


def quantize(fp32: Path, made: Path, images: Tensor, network: Form, measure: Callable[..., Form]) -> Form:
    """Writes the first int8 file that is accurate and small enough. Approaches with more int8 arithmetic come first.

    Args:
        fp32: the ONNX file to quantize.
        made: the file to write.
        images: uint8 (N, C, H, W) of the training set, for calibration.
        network: the network in PyTorch. The accuracy on the test set decides, because the user is promised it.
        measure: measures a file from its name, path and session.

    Raises:
        RunError: no approach reaches the limits; lists what each one reached.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    onnxruntime.set_default_logger_severity(3)  # errors only, also of the sessions that calibration opens
    size, tried = fp32.stat().st_size, []
    approaches: dict[str, dict[str, Any] | int] = {
        "static, QDQ": {},
        "static, QDQ, percentiles": {"calibrate_method": CalibrationMethod.Percentile},
        "static, QDQ, 7-bit weights": {"reduce_range": True},
        # One node instead of QDQ's three; its kernels need unsigned activations.
        "static, QOperator": {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8},
        "weights only": 0,
        "weights only, small layers fp32": 128,
    }
    for name, settings in approaches.items():
        model = onnx.load(fp32)
        try:
            if isinstance(settings, int):
                _quantize_weights(model, smallest=settings)
            else:
                quantize_static(model, made, _Calibration(images), per_channel=True, **settings)
                model = onnx.load(made)
            slim_onnx(model)
            onnx.save(model, made)
            form = measure(f"onnx-int8 ({name})", made, onnx_session(made))
        except Exception as error:  # a user's own network may raise anything; another approach may work
            tried.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if abs(form.accuracy - network.accuracy) <= LARGEST_LOSS + 1e-9 and form.size <= LARGEST_SHARE * size:
            return form
        tried.append(f"{name}: {form.accuracy:.2f} %, {form.size:,} bytes ({form.size / size:.1%} of fp32)")
    limits = f"{network.accuracy:.2f} ± {LARGEST_LOSS} % in {LARGEST_SHARE:.0%} of fp32's {size:,} bytes"
    raise RunError("\n  ".join([f"no int8 file reaches {limits}; nothing was written. Tried:", *tried]))


class _Calibration:
    """Returns evenly spaced images, one per call, as onnxruntime's calibration expects."""

    def __init__(self, images: Tensor) -> None:
        spaced = images[:: max(1, len(images) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
        self.rest = iter(spaced.numpy()[:, None])

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.rest, None)
        return None if image is None else {"images": image}


def _quantize_weights(model: Any, *, smallest: int) -> None:
    """Stores float tensors of two or more dimensions as int8 with a scale per row; the arithmetic stays fp32.

    Tensors of fewer than `smallest` elements stay fp32.
    """
    import onnx

    tensors, nodes = [], []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < smallest:
            tensors.append(tensor)
            continue
        integers, scales = _as_int8(values.reshape(len(values), -1))
        names = [f"{tensor.name}/integers", f"{tensor.name}/scales"]
        tensors += map(onnx.numpy_helper.from_array, (integers.reshape(values.shape), scales), names)
        nodes.append(onnx.helper.make_node("DequantizeLinear", names, [tensor.name], axis=0))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(tensors)
    model.graph.node.extend(nodes)


def _as_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 (R, C) and scales, float32 (R,), with the least squared error for each row of float32 (R, C).

    Tries 41 ranges for each row, from 1 to 0.6 of its largest value: to clip that value may give a smaller error.
    """
    largest = np.maximum(np.abs(rows).max(axis=1), np.finfo(np.float32).tiny * 127)
    best = np.full(len(rows), np.inf)
    integers, scales = np.zeros(rows.shape, np.int8), np.zeros(len(rows), np.float32)
    for share in np.linspace(1, 0.6, 41, dtype=np.float32):
        steps = share * largest / 127
        tried = np.rint(rows / steps[:, None]).clip(-127, 127)
        errors = np.square(tried * steps[:, None] - rows).sum(axis=1)
        better = errors < best
        best[better], integers[better], scales[better] = errors[better], tried[better], steps[better]
    return integers, scales
