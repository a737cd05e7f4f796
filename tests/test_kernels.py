"""Which kernels a GPU is told to take (on a machine without one, by what torch then holds), and how they are named."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import changed, tiny_config
from torch.nn.attention import SDPBackend

from pretrain.benchmark.kernels import group_of, kernels_of
from pretrain.config import Config
from pretrain.engine.kernels import _is_ordered, choose_kernels


def chosen(config: Config, capability: tuple[int, int], cudnn: int) -> tuple[str, bool, bool, bool]:
    """The line that is told; whether cuDNN's attention is on, and the first; whether algorithms are deterministic."""
    version = mock.patch("torch.backends.cudnn.version", return_value=cudnn)
    with mock.patch("torch.cuda.get_device_capability", return_value=capability), version:
        told = choose_kernels(config, torch.device("cuda"))
        assert choose_kernels(config, torch.device("cuda")) == told  # a second engine of the process
    first = torch._C._get_sdp_priority_order()[0] == int(SDPBackend.CUDNN_ATTENTION)  # type: ignore[attr-defined]
    return told, torch.backends.cuda.cudnn_sdp_enabled(), first, torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("capability", "cudnn"), [((8, 0), 91900), ((9, 0), 91900), ((9, 0), 91002)])
@pytest.mark.parametrize("tokens", [256, 257])
def test_attention_of_a_gpu(
    tokens: int, capability: tuple[int, int], cudnn: int, deterministic: bool, tmp_path: Path
) -> None:
    """cuDNN's first on Hopper, off elsewhere, where it is old and where one order is asked for; 257 tokens are told."""
    config = tiny_config(tmp_path, tmp_path, engine__deterministic=deterministic)
    pooling = "token" if tokens == 257 else "gap"
    config = changed(config, model={"name": "Ti/14", "image_size": 224, "pooling": pooling})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        told, on, first, ordered = processes.submit(chosen, config, capability, cudnn).result(timeout=200)
    hopper = capability == (9, 0) and cudnn > 91500 and not deterministic
    assert (on, first, ordered) == (hopper, hopper, deterministic)
    assert bool(told) == (tokens > 256 and not deterministic), told


@pytest.mark.parametrize(
    ("model", "ordered"),
    [
        ({"name": "B/16"}, True),
        ({"name": "R50+B/16"}, False),
        ({"name": "B/16", "positions": "relative"}, False),
        ({"name": "B/16", "heads": 8}, False),
        ({"name": "timm:vit_base_patch16_224"}, False),
    ],
)
def test_what_has_no_order_is_known(model: dict[str, Any], ordered: bool, tmp_path: Path) -> None:
    """Convolutions, the scatter of relative positions, wide heads, and what is not known of timm's models."""
    assert _is_ordered(changed(tiny_config(tmp_path, tmp_path), model=model)) == ordered


def test_nothing_is_chosen_on_a_cpu(tmp_path: Path) -> None:
    order = torch._C._get_sdp_priority_order()  # type: ignore[attr-defined]
    assert choose_kernels(tiny_config(tmp_path, tmp_path, engine__deterministic=True), torch.device("cpu")) == ""
    assert torch._C._get_sdp_priority_order() == order  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)", "attention"),
        ("triton_poi_fused_gelu_gelu_backward_view_0", "compiled"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>>", "optimizer"),
        ("Memset (Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collectives"),
        ("void at::native::reduce_kernel<128, 4>", "other"),
        ("aten::addmm", "products"),
    ],
)
def test_kernels_belong_to_groups(kernel: str, group: str) -> None:
    """By the names that an H100 gave them, with torch 2.11."""
    assert group_of(kernel) == group


def test_a_step_is_told_by_kernels() -> None:
    matrix = torch.randn(200, 200)
    found = kernels_of(lambda: (matrix @ matrix).relu_(), gpu=False)
    kernels = {kernel["kernel"]: kernel for kernel in found["kernels"]}
    assert kernels["aten::mm"]["calls"] == kernels["aten::clamp_min_"]["calls"] == 1
    groups = found["kernel_groups_ms"]
    assert groups["products"] > 0 and groups["other"] > 0 == groups["attention"]
    assert sum(groups.values()) == pytest.approx(sum(kernel["ms"] for kernel in found["kernels"]), rel=0.01)
