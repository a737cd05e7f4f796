"""A folder with model.onnx: float32 images [batch, 3, H, W] in [-1, 1] -> logits and the head's input."""

import contextlib
import io
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from pretrain.config import MINUS_ONE_TO_ONE, Normalisation
from pretrain.errors import UserError
from pretrain.models.tensors import Weights
from pretrain.models.weights import model_of

OPSET = 18  # the lowest that torch's exporter writes without a conversion: read by the most runtimes
_TRANSFORM = ("eval_transform", "eval_crop", "interpolation")  # of evaluation, as in DataConfig
_MAX_BYTES = 1_900_000_000  # a protobuf has at most 2 GiB; beyond that, tensors are in model.onnx.data


class _BothOutputs(nn.Module):
    """Logits [batch, classes], where there is a head, and its input [batch, D], of images in [-1, 1]."""

    def __init__(self, model: nn.Module, num_classes: int, normalisation: Normalisation) -> None:
        super().__init__()
        self.model, self.num_classes = model, num_classes
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
        self.is_plain = normalisation == MINUS_ONE_TO_ONE
        self.scale, self.shift = nn.Buffer(0.5 / std), nn.Buffer((0.5 - mean) / std)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.is_plain:  # the weights' own normalisation is a part of the graph
            images = images * self.scale + self.shift
        tokens = self.model.forward_features(images)  # type: ignore[operator]
        features = self.model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        return (self.model.forward_head(tokens), features) if self.num_classes else (features,)  # type: ignore[operator]


def write_onnx(weights: Weights, out: Path) -> None:
    """Writes model.onnx for any batch size; its metadata has class names and transform (JSON), range of pixels, loss.

    Not streaming: the exporter holds the model several times. Raises UserError when its packages are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # the exporter needs it
    except ImportError as error:
        raise UserError(f"--to onnx needs the package {error.name}: pip install onnx onnxscript onnxruntime") from None
    model = model_of(weights)
    size = weights.model.image_size
    path = out / "model.onnx"
    out.mkdir(parents=True, exist_ok=True)
    names = (["logits"] if weights.num_classes else []) + ["features"]
    # Attention as plain operations: the exporter fails on the strides of the fused kernel with a mask, as relative
    # positions have.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    try:
        with plain, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints its steps
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _BothOutputs(model, weights.num_classes, weights.normalisation),
                (torch.zeros(2, 3, size, size),),
                input_names=["images"],
                output_names=names,
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{weights.source}: torch's exporter cannot write {weights.model.name} ({reason})") from None
    assert program is not None
    metadata = program.model.metadata_props
    metadata["pixels"] = "RGB, (x - 127.5) / 127.5"
    metadata["transform"] = json.dumps({key: getattr(weights, key) for key in _TRANSFORM})
    if weights.loss is not None:
        metadata["loss"] = weights.loss
    if weights.of_run is not None:
        metadata["of_run"] = weights.of_run
    if weights.class_names:
        metadata["class_names"] = json.dumps(weights.class_names)
    num_bytes = sum(4 * torch.Size(tensor.shape).numel() for tensor in weights.tensors.values())
    program.save(str(path), external_data=num_bytes > _MAX_BYTES)
    onnx.checker.check_model(str(path))
