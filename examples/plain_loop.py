"""What a pretraining run computes, in plain torch and timm: the same losses, step by step, without this package.

    DS_ACCELERATOR=cpu python launch/pretrain.py --config examples/plain_loop.yaml    the run (its data: `make demo`)
    python examples/plain_loop.py runs/plain_loop    the same losses as in its metrics.jsonl, to 1e-6, on a CPU

It reads config.yaml and, for the samples of each step, samples-00000.jsonl from the run's folder, and the manifest and
the tars of its data. Initial weights, schedule, decay, clipping and loss come from the code below alone. A run that
uses what it does not know (augmentation, other optimizers and precisions, several ranks) has other losses.
"""

import json
import math
import sys
import tarfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torchvision.io import ImageReadMode, decode_image


def main(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    torch.set_num_threads(1)  # for a fixed order of sums
    images, labels, num_classes = read_data(Path(config["data"]["train"]))
    model = build_model(config["model"], num_classes)
    init_weights(model, torch.Generator().manual_seed(config["seed"]))
    optimizer = build_optimizer(model, config["optim"])
    for line in (run / "samples-00000.jsonl").read_text().splitlines():
        step, samples = (json.loads(line)[key] for key in ("step", "samples"))  # steps count from 1
        indices = [index for _, index in samples]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config["optim"], config["total_steps"], step - 1)
        logits = model(images[indices] / 127.5 - 1.0)  # [batch, 3, side, side] in [-1, 1] -> [batch, classes]
        loss = F.cross_entropy(logits, labels[indices], reduction="none").sum()
        optimizer.zero_grad()
        (loss / len(indices)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["optim"]["clip_norm"])
        optimizer.step()
        print(f"step {step:3d}  loss {loss.item() / len(indices):.9f}", flush=True)


def read_data(place: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns all images as float32 [n, 3, side, side] of 0..255, their classes and how many classes there are.

    A sample's index is its place in the shards, in the manifest's order; its members follow each other in the tar.
    """
    path = place / "manifest.json" if place.is_dir() else place
    manifest = json.loads(path.read_text())
    images, labels = [], []
    for shard in manifest["shards"]:
        with tarfile.open(path.parent / shard["path"]) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, member.name
                if member.name.endswith(".cls"):
                    labels.append(int(file.read()))
                else:
                    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
                    images.append(decode_image(data, ImageReadMode.RGB))
    return torch.stack(images).float(), torch.tensor(labels), manifest["label"]["num_classes"]


def build_model(shape: dict[str, Any], num_classes: int) -> nn.Module:
    """The paper's ViT: class token, learned positions, LayerNorm with eps 1e-6, the tanh form of GELU."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=num_classes,
        img_size=shape["image_size"],
        patch_size=shape["patch_size"],
        embed_dim=shape["width"],
        depth=shape["depth"],
        num_heads=shape["heads"],
        mlp_ratio=shape["mlp_dim"] / shape["width"],
        act_layer="gelu_tanh",
    )


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """As Google's code: Xavier for dense layers (q, k, v each by itself), N(0, 0.02) positions, a head of zeros."""
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            parameter.normal_(std=0.02, generator=generator)
        elif name == "patch_embed.proj.weight":  # LeCun's normal, cut off at two standard deviations
            std = math.sqrt(1 / parameter[0].numel()) / 0.87962566103423978
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        elif ".mlp." in name and name.endswith(".bias"):
            parameter.normal_(std=1e-6, generator=generator)
        elif "norm" in name and name.endswith(".weight"):
            parameter.fill_(1.0)
        elif parameter.ndim == 2 and name != "head.weight":
            for part in parameter.chunk(3) if ".qkv." in name else [parameter]:
                nn.init.xavier_uniform_(part, generator=generator)
        else:  # biases, class token, the head
            parameter.zero_()


def build_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; weight decay is for kernels: not for biases, norms, the class token and positions."""
    kernels = [p for name, p in model.named_parameters() if p.ndim >= 2 and name.endswith(".weight")]
    others = [p for name, p in model.named_parameters() if not (p.ndim >= 2 and name.endswith(".weight"))]
    groups = [{"params": kernels, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=tuple(settings["betas"]), eps=settings["eps"])


def learning_rate(settings: dict[str, Any], total_steps: int, step: int) -> float:
    """A linear warm-up from 0, times half a cosine from the peak to 0; `step` counts from 0."""
    warmup = settings["warmup_steps"]
    progress = max(0, step - warmup) / (total_steps - warmup)
    return min(1.0, step / warmup) * settings["lr"] * 0.5 * (1 + math.cos(math.pi * progress))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
