"""The configuration: every mistake is refused in one line that names the key, and what is written reads back equal."""

import ast
import copy
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run_ranks
from tiny import tiny_config

from pretrain.config import (
    BRANCH_MAY_CHANGE,
    MAY_CHANGE,
    Config,
    ModelConfig,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    option_hint,
    resume_differences,
)
from pretrain.config.hints import OTHER_NAMES
from pretrain.errors import ConfigError, StorageError, UserError
from pretrain.train.epochs import in_steps

ROOT = Path(__file__).resolve().parents[1]
SMALLEST: dict[str, Any] = {
    "name": "trial",
    "total_steps": 100,
    "model": {"name": "S"},
    "data": {"train": "shards", "global_batch": 8},
    "optim": {"lr": 1e-3},
}


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, sections included, found without the code under test."""
    found = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        found.append(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            found += keys(hints[field.name], f"{prefix}{field.name}.")
    return found


def misspellings(key: str) -> list[str]:
    """The key with a letter of its last part dropped, doubled, and swapped with the next; legal keys left out."""
    section, dot, word = key.rpartition(".")
    at = max(0, len(word) // 2 - 1)
    wrong = {
        word[:at] + word[at + 1 :],
        word[: at + 1] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    }
    return sorted({f"{section}{dot}{w}" for w in wrong} - set(keys()))


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `change` says otherwise."""
    result = copy.deepcopy(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def written(folder: Path, values: Any) -> Path:
    """A YAML file of the values (or of the text) in the folder."""
    path = folder / "trial.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def smallest(folder: Path, *overrides: str) -> Config:
    """The config that names only what must be named, changed by the overrides."""
    return load_config(written(folder, SMALLEST), overrides)


def refusal(path: Path, *overrides: str) -> str:
    """The message with which the config is refused, checked to be one line."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value) and "$VALUE" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key", keys())
def test_every_misspelt_key_is_refused_with_a_suggestion(key: str, tmp_path: Path) -> None:
    """A letter dropped, doubled or swapped in any key never passes unnoticed, in overrides and (every second) in files.

    The message names the source, the wrong key, once, and the right one.
    """
    assert len(misspellings(key)) >= 2
    for number, wrong in enumerate(misspellings(key)):
        if number % 2:
            message = refusal(written(tmp_path, merged(SMALLEST, nested(wrong, 1))))
            source = f"{tmp_path / 'trial.yaml'}: {wrong}"
        else:
            message = refusal(written(tmp_path, SMALLEST), f"{wrong}=1")
            source = f"{wrong}=1"
        assert message.startswith(f"{source}: no such key in ")
        assert message.endswith(f"Did you mean: '{key}'?"), message


def test_a_key_of_another_section_is_found(tmp_path: Path) -> None:
    """A right name in the wrong section is answered with the section it belongs to."""
    message = refusal(written(tmp_path, SMALLEST), "model.global_batch=3")
    assert "no such key in model. Did you mean: 'data.global_batch'?" in message
    assert "Did you mean: 'seed'?" in refusal(written(tmp_path, SMALLEST), "data.seed=3")


@pytest.mark.parametrize(
    "override, named, said",
    [
        ("optim.lr=fast", "optim.lr", "expected a number, for example 1e-3"),
        ("optim.lr=[1]", "optim.lr", "expected a number"),
        ("optim.lr=null", "optim.lr", "expected a number"),
        ("optim.lr=true", "optim.lr", "expected a number"),
        ("seed=1.5", "seed", "expected a whole number, for example 1000"),
        ("seed=true", "seed", "expected a whole number"),
        ("seed=None", "seed", "expected a whole number"),
        ("model.heads=2.5", "model.heads", "expected a whole number, or null for none"),
        ("data.val=None", "data.val", "expected a path, or null for none"),
        ("data.val=[a]", "data.val", "expected a path, or null for none"),
        ("log.wandb_project=None", "log.wandb_project", "expected a text, or null for none"),
        ("data.antialias=perhaps", "data.antialias", "expected true or false"),
        ("output=", "output", "expected a path"),
        ("engine.compile=perhaps", "engine.compile", "'perhaps'"),
        ("optim.schedule=cos", "optim.schedule", "expected one of ['cosine', 'linear', 'rsqrt', 'constant', 'stair']"),
        ("engine.precision=fp8", "engine.precision", "'bf16', 'fp16', 'fp32'"),
        ("data.train=[1]", "data.train", "[1]"),
        (
            "evaluation.fewshot_shots=5",
            "evaluation.fewshot_shots",
            "a list of whole numbers, for example [1, 5, 10, 25]",
        ),
        ("evaluation.fewshot_shots=[a]", "evaluation.fewshot_shots", "expected a list of whole numbers"),
        ("optim.betas=0.9,0.99", "optim.betas", "expected two numbers, for example [0.9, 0.999]"),
        ("optim.betas=(0.9,0.99)", "optim.betas", "expected two numbers, for example [0.9, 0.999]"),
        ("data.mean=0.5", "data.mean", "expected three numbers, for example [0.5, 0.5, 0.5]"),
        ("data.crop_area=0.5", "data.crop_area", "expected two numbers, for example [0.08, 1.0]"),
        ("data.crop_area=[0.5]", "data.crop_area", "expected two numbers"),
        ("data.crop_area=[0.5,x]", "data.crop_area", "expected two numbers"),
        ("data.crop_area=[0.1,0.2,0.3]", "data.crop_area", "expected two numbers"),
        ("optim.betas=[0.9,[1]]", "optim.betas", "expected two numbers"),
        ("optim.betas=[0.9,true]", "optim.betas", "expected two numbers"),
        ("optim.betas.0=0.5", "optim.betas", "is {'0': 0.5}, expected two numbers"),
        ("model=3", "model", "expected a section with name, image_size"),
        ("model=B/16", "model", "a section: write model.name=B/16, or model.name=timm:B/16 for a model of timm's"),
        ("engine=[1]", "engine", "expected a section with zero_stage"),
        ("log=null", "log", "expected a section"),
        ("optim.lr.x=1", "optim.lr", "is {'x': 1}, expected a number"),
        ("name=null", "name", "expected a text"),
        ("optim.lr=${nothing}", "optim.lr", "'nothing' not found"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_key_and_value(
    override: str, named: str, said: str, tmp_path: Path
) -> None:
    """Numbers, choices, pairs and sections: the message names the key, the value, and what is expected."""
    key, _, text = override.partition("=")
    message = refusal(written(tmp_path, SMALLEST), override)
    assert message.startswith(f"{override}: ") and said in message
    assert not re.search("Node|Config\\b|of type|Incompatible", message)  # omegaconf's own words
    in_file = written(tmp_path, merged(SMALLEST, nested(key, yaml.safe_load(text))))
    if "." not in text:  # where YAML of the file reads the number as the override's parser does
        assert f"{named}" in refusal(in_file).removeprefix(str(in_file))


def test_a_value_of_a_file_is_told_with_its_key(tmp_path: Path) -> None:
    """Several of them at once; null and true as the file has them. An override has the key already."""
    assert smallest(tmp_path) and refusal(tmp_path / "trial.yaml", "optim.lr=abc") == (
        "optim.lr=abc: expected a number, for example 1e-3"
    )
    path = written(tmp_path, merged(SMALLEST, {"output": None, "seed": True, "optim": {"lr": "fast"}}))
    told = refusal(path).removeprefix(f"{path}: ").split("; ")
    assert sorted(told) == [
        "optim.lr is 'fast', expected a number, for example 1e-3",
        "output is null, expected a path",
        "seed is true, expected a whole number, for example 1000",
    ]


def test_whole_numbers_may_have_exponents(tmp_path: Path) -> None:
    """1e3 is a float to YAML; it is taken where it is whole, and never rounded."""
    steps = ["optim.schedule=stair", "optim.stair_steps=[1e1,2e1]", "optim.stair_multipliers=[0.5,0.1]"]
    config = smallest(tmp_path, "total_steps=1e3", "model.heads=1.2e1", *steps)
    assert (config.total_steps, config.model.heads, config.optim.stair_steps) == (1000, 12, [10, 20])
    assert all(type(value) is int for value in (config.total_steps, config.model.heads, *config.optim.stair_steps))
    for wrong in ("seed=1e-3", "seed=1e300", "seed=inf", "seed=nan"):
        assert refusal(tmp_path / "trial.yaml", wrong) == f"{wrong}: expected a whole number, for example 1000"


def test_an_override_at_fault_is_named(tmp_path: Path) -> None:
    """Not the file, which is right: for ranges and for what does not go together; each problem behind its own."""
    path = written(tmp_path, SMALLEST)
    assert refusal(path, "optim.lr=-1", "seed=3") == "optim.lr=-1: optim.lr is -1.0, expected 0 to 1000.0"
    assert refusal(path, "name=../x").startswith("name=../x: name is '../x'")
    assert refusal(path, "optim.cooldown_steps=300").startswith("optim.cooldown_steps=300: optim.warmup_steps (0) and")
    assert refusal(path, "data.train=[a]").startswith("data.train=[a]: data.train is ['a']")
    assert refusal(path, "name=other", "model.name=Z").startswith("model.name=Z: model.name is 'Z'")
    for override in ("model.depth=-1", "model.width=-1", "model.heads=-1", "optim.momentum=1", "data.crop=simple"):
        assert refusal(path, "seed=3", override, *["data.crop_area=[0.5,1]"] * override.startswith("data")).startswith(
            f"{override}"
        )
    wrong = written(tmp_path, merged(SMALLEST, {"data": {"flip": 2.0}}))
    told = refusal(wrong, "seed=-1", "name=other")
    assert f"{wrong}: data.flip is 2.0, expected 0 to 1; seed=-1: seed is -1, expected 0 to" in told


def test_an_override_cut_by_the_shell_is_told_whole(tmp_path: Path) -> None:
    """What `optim.betas=[0.9, 0.99]` becomes without quotes, also where more follows; a lone bracket has no rest."""
    path = written(tmp_path, SMALLEST)
    cut = ["optim.betas=[0.9,", "0.99]", "seed=1"]
    said = "ends within brackets; put it in quotes: "
    assert refusal(path, *cut) == f"optim.betas=[0.9,: {said}'optim.betas=[0.9, 0.99]'"
    assert refusal(path, "data.train=[{path:", "a}]").endswith(f"{said}'data.train=[{{path: a}}]'")
    assert refusal(path, "optim.betas=[0.9", "seed=1").endswith("ends within brackets; its closing bracket is missing")
    assert "unicode string" not in refusal(path, "optim.lr=]")


def test_files_of_other_programs_are_told_as_such(tmp_path: Path) -> None:
    """big_vision's configs are Python; timm's args.yaml has the model's name where a section is."""
    (tmp_path / "vit_s16.py").write_text("def get_config():\n  return {'a': 1}\n")
    assert refusal(tmp_path / "vit_s16.py").endswith(
        "vit_s16.py: is a Python file, expected YAML, as in configs/ (docs/coming_from.md)"
    )
    message = refusal(written(tmp_path, "model: vit_small_patch16_224\nopt: adamw\nlr: 0.001\n"))
    assert "model is 'vit_small_patch16_224', expected a section: write model.name=vit_small" in message


def test_all_missing_values_are_listed_at_once(tmp_path: Path) -> None:
    """An empty file is answered with every key that has no default, so that nobody finds them one by one."""
    message = refusal(written(tmp_path, ""))
    wanted = ["data.global_batch", "data.train", "model.name", "name", "optim.lr", "total_steps"]
    assert f"no value for {', '.join(wanted)}" in message
    assert "no value for optim.lr;" in refusal(written(tmp_path, merged(SMALLEST, {"optim": {"lr": "???"}})))


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["model.name=Z"], "model.name is 'Z', expected one of Ti, S"),
        (["model.name=so400m"], "Did you mean: 'So400m'?"),
        (["model.name=vit_base_patch16_244"], "or timm:NAME. Did you mean: 'vit_base_patch16_224'?"),
        (["model.name=B/15"], "; for patches of 15 pixels write model.name=B model.patch_size=15"),
        (["model.name=resnet50"], "; resnet50 is timm's: write model.name=timm:resnet50"),
        (["model.name=vit_small_patch14_reg4_dinov2.lvd142m"], "name=timm:vit_small_patch14_reg4_dinov2"),
        (["model.name=resnet5"], "Did you mean: 'timm:resnet50'?"),
        (["model.patch_size=15"], "model.image_size (224) is not a multiple of model.patch_size (15)"),
        (["model.patch_size=0"], "model.patch_size (0)"),
        (["model.heads=5"], "model.width (384) is not a multiple of model.heads (5)"),
        (["model.heads=0"], "must be positive"),
        (["model.depth=-1"], "must be positive"),
        (["model.width=42", "model.heads=6", "model.positions=sincos2d"], "not a multiple of 4"),
        (["model.name=timm:resnet18", "model.patch_size=8"], "model.patch_size has no effect on timm:resnet18"),
        (["model.num_classes=0"], "model.num_classes is 0"),
        (["model.dropout=1"], "model.dropout is 1.0, expected 0 to 0.99"),
        (["model.drop_path=-0.1"], "model.drop_path is -0.1"),
        (["model.head_bias=inf"], "model.head_bias is inf"),
        (
            ["loss=softmax", "label_threshold=0"],
            "label_threshold needs loss=sigmoid and label_smoothing=0; now loss=softmax, label_smoothing=0",
        ),
        (["loss=sigmoid", "label_threshold=1"], "label_threshold is 1.0, expected 0 to 0.99"),
        (["data.held_out=5", "data.val=v"], "data.held_out (5) and data.val (v) are both set"),
        (["data.crop_area=[0.5,0.4]"], "data.crop_area is (0.5, 0.4), expected 0 < low <= high"),
        (["data.crop_ratio=[0,1]"], "data.crop_ratio is (0.0, 1.0)"),
        (["data.crop_area=[0.5,1.5]"], "no more than 1.0"),
        (["data.crop=simple", "data.crop_area=[0.2,1]"], "data.crop_area ((0.2, 1.0)) has no effect: crop=simple"),
        (["data.crop=simple", "data.antialias=false"], "data.antialias (False) has no effect: crop=simple"),
        (["data.crop=squashed", "data.crop_area=[0.2,1]"], "data.crop_area ((0.2, 1.0)) has no effect: crop=squashed"),
        (["data.crop_share=0.9"], "data.crop_share (0.9) has no effect: crop=random_resized"),
        (["data.crop=squashed", "data.crop_share=1.5"], "data.crop_share is 1.5"),
        (["data.global_batch=0"], "data.global_batch is 0"),
        (["data.held_out=-1"], "data.held_out is -1"),
        (["data.subset=0"], "data.subset is 0, expected 1 to"),
        (["data.repeats=0"], "data.repeats is 0, expected 1 to"),
        (["data.repeats=3", "data.global_batch=2048"], "(2048) is no multiple of data.repeats (3); try 2046"),
        (["data.join_classes=true"], "data.join_classes has no effect: data.train is one set"),
        (["data.flip=1.1"], "data.flip is 1.1"),
        (["data.color_jitter=-0.1"], "data.color_jitter is -0.1, expected 0 to 10"),
        (["data.random_erasing=2"], "data.random_erasing is 2.0, expected 0 to 1"),
        (["data.three_augment=true", "data.randaugment_layers=2"], "data.randaugment_layers (2) are both set"),
        (["data.eval_crop=0"], "data.eval_crop is 0.0"),
        (["data.max_bad_fraction=2"], "data.max_bad_fraction is 2.0"),
        (["data.workers=-1"], "data.workers is -1"),
        (["data.prefetch=0"], "data.prefetch is 0"),
        (["optim.lr=-1"], "optim.lr is -1.0"),
        (["optim.lr=nan"], "optim.lr is nan"),
        (["optim.betas=[0.9,1.0]"], "optim.betas is (0.9, 1.0)"),
        (["optim.eps=-1"], "optim.eps is -1.0"),
        (["optim.weight_decay=-0.1"], "optim.weight_decay is -0.1"),
        (["optim.clip_norm=-1"], "optim.clip_norm is -1.0"),
        (["optim.layer_decay=0"], "optim.layer_decay is 0.0, expected 0.01 to 1"),
        (["optim.warmup_steps=-1"], "optim.warmup_steps is -1"),
        (["optim.warmup_steps=101"], "optim.warmup_steps (101) is larger than total_steps (100)"),
        (
            ["optim.schedule=rsqrt", "optim.end_lr=1e-5"],
            "(1e-05) is used by cosine and linear only, not by optim.sched",
        ),
        (["optim.power=2"], "optim.power (2.0) is used by linear only, not by optim.schedule=cosine"),
        (["optim.momentum=0.8"], "optim.momentum (0.8) is used by sgd only, not by optim.name=adamw"),
        (
            ["optim.name=sgd", "optim.eps=1e-6"],
            "optim.eps (1e-06) is used by adamw and lamb only, not by optim.name=sgd",
        ),
        (
            ["optim.name=sgd", "optim.betas=[0.9,0.95]"],
            "is used by adamw, lion and lamb only, not by optim.name=sgd",
        ),
        (["optim.name=lamb"], "optim.name=lamb adapts the steps of what decays, and optim.weight_decay is 0: set it"),
        (["optim.head_decay_multiplier=100"], "has no effect: optim.weight_decay is 0"),
        (["optim.schedule=stair", "optim.stair_steps=[9]", "optim.stair_multipliers=[-1]"], "numbers from 0 on"),
        (["optim.schedule=stair", "optim.stair_steps=[100]", "optim.stair_multipliers=[1]"], "never reached"),
        (["data.eval_transform=vit", "data.eval_crop=0.9"], "data.eval_crop (0.9) has no effect"),
        (["model.name=vit_base_patch16_384", "model.image_size=224"], "model.image_size is 224, but vit_base_patch16"),
        (["model.name=B/32", "model.patch_size=16"], "model.patch_size is 16, but B/32 has 32; remove one"),
        (["optim.timescale_steps=0"], "optim.timescale_steps is 0"),
        (["engine.zero_stage=0"], "engine.zero_stage is 0: DeepSpeed's stage 0 decays weights before the first step"),
        (["engine.zero_stage=4"], "engine.zero_stage is 4, expected 1, 2 or 3"),
        (["engine.max_micro_batch_size=0"], "engine.max_micro_batch_size is 0"),
        (["engine.fp8=true", "model.name=Bx"], "model.name is 'Bx'"),
        (["engine.timeout_s=0"], "engine.timeout_s is 0"),
        (["evaluation.every_steps=-1"], "evaluation.every_steps is -1"),
        (["evaluation.batch_size=0"], "evaluation.batch_size is 0"),
        (["log.every_steps=0"], "log.every_steps is 0"),
        (["log.wandb_entity=us"], "log.wandb_entity (us) has no effect: log.wandb_project is null"),
        (["checkpoint.every_steps=0"], "checkpoint.every_steps is 0"),
        (["checkpoint.keep_last=1"], "checkpoint.keep_last is 1, expected 2"),
        (["checkpoint.keep_every_steps=-1"], "checkpoint.keep_every_steps is -1"),
        (["total_steps=0"], "total_steps is 0"),
        (["total_steps=10_000_000_000"], "total_steps is 10000000000, expected 1 to 9999999999"),
        (["seed=-1"], "seed is -1"),
        (["name=../other"], "name is '../other'"),
        (["init_new_head=true"], "init_new_head needs init_from"),
    ],
)
def test_each_inconsistent_combination_is_refused(overrides: list[str], said: str, tmp_path: Path) -> None:
    """What cannot work is refused when the config is read, with the key and both values, before anything starts."""
    assert said in refusal(written(tmp_path, SMALLEST), *overrides)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """Independent mistakes do not have to be found one start at a time."""
    message = refusal(written(tmp_path, SMALLEST), "data.flip=2", "optim.eps=2", "checkpoint.keep_last=0")
    assert all(key in message for key in ("data.flip", "optim.eps", "checkpoint.keep_last"))


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:HOME}",
        "data: {train: '${oc.env:HOME}/x'}",
        'name: "$\\x7Boc.env:HOME}"',
        "name: ${${seed}:HOME}",
        "model: {name: '${oc.decode:${name}}'}",
        "optim: {betas: ['${oc.env:HOME}', 0.9]}",
    ],
)
def test_resolvers_are_refused(text: str, tmp_path: Path) -> None:
    """No spelling of ${oc.env:NAME} can copy a secret of the environment into the saved config."""
    assert "resolvers are not allowed" in refusal(written(tmp_path, text))


def test_a_resolver_in_an_override_is_refused_and_a_reference_works(tmp_path: Path) -> None:
    """${key} refers to another value; ${resolver:...} is refused on the command line too."""
    assert "resolvers are not allowed" in refusal(written(tmp_path, SMALLEST), "name=${oc.env:HOME}")
    assert smallest(tmp_path, "evaluation.every_steps=${checkpoint.every_steps}").evaluation.every_steps == 1000


@pytest.mark.parametrize(
    "text", ["- a\n", "5", "just words: [", "name: a\nname: b\n", "\x00", "a: !!python/name:os.system"]
)
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    """Lists, scalars, broken YAML, repeated keys and Python tags end in one line that names the file."""
    assert refusal(written(tmp_path, text)).startswith(str(tmp_path / "trial.yaml"))


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    """A misspelt file name is answered with the name that is there."""
    written(tmp_path, SMALLEST)
    assert "Did you mean: 'trial.yaml'?" in refusal(tmp_path / "trail.yaml")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epochs", "total_epochs (or total_steps)"),
        ("lr", "optim.lr"),
        ("batch_size", "data.global_batch, images per step of all ranks together"),
        ("data.batch_size", "data.global_batch, images per step of all ranks together"),
        ("weight_decay", "optim.weight_decay"),
        ("optim.wd", "optim.weight_decay, torch's: big_vision's wd / lr"),
        ("blr", "optim.lr, of the whole batch: a rate for 256 images times data.global_batch / 256"),
        ("warmup_epochs", "optim.warmup_steps, in steps"),
        ("init_values", "model.layer_scale"),
        ("img-size", "model.image_size"),
        ("resume", "nothing: the same command goes on by itself"),
    ],
)
def test_other_programs_names_are_understood(key: str, meant: str, tmp_path: Path) -> None:
    """As an override, in a file, and as an option."""
    said = f"no such key; here it is {meant}"
    assert refusal(written(tmp_path, SMALLEST), f"{key}=1") == f"{key}=1: {said}"
    assert f"{key}: {said}" in refusal(written(tmp_path, merged(SMALLEST, nested(key, 1))))
    if "." not in key:
        assert option_hint(f"--{key}").endswith(f"here this one is {meant}")


def test_every_hint_names_a_key() -> None:
    """No hint is a key itself, unless it is one of another section; what it names is there."""
    for other, meant in OTHER_NAMES.items():
        assert other not in keys()
        for name in re.findall(r"\b(?:model|data|optim|engine|evaluation|log|checkpoint)\.\w+|total_\w+|^\w+$", meant):
            assert name in keys(), (other, name)


def test_the_page_for_those_who_come_names_real_keys() -> None:
    """Every KEY and KEY=VALUE of docs/coming_from.md that is of a section, or alone in the right column, is a key."""
    text = (ROOT / "docs" / "coming_from.md").read_text()
    sections = "model|data|optim|engine|evaluation|log|checkpoint"
    named = set(re.findall(rf"(?<![\w.])(?:{sections})\.\w+", text)) - {"data.md"}
    named |= set(re.findall(r"\b(total_\w+|init_\w+|loss|label_\w+)=", text)) - {"init_head_bias", "init_values"}
    assert len(named) > 40 and named <= set(keys()), named - set(keys())


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--optim.lr=1", "settings are written without dashes: optim.lr=1"),
        ("--optim.lr", "settings are written without dashes: optim.lr=VALUE"),
        ("--seed=3", "settings are written without dashes: seed=3"),
        (
            "--batch-size",
            "settings are written KEY=VALUE, and here this one is data.global_batch, images per step of all",
        ),
    ],
)
def test_options_of_other_programs_are_one_line(option: str, hint: str, tmp_path: Path) -> None:
    """launch/pretrain.py says how it is written here, before torch is imported."""
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", str(written(tmp_path, SMALLEST))]
    done = subprocess.run([*command, option], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {option}: no such option; {hint}") and done.stderr.count("\n") == 1


def test_help_lists_every_setting_with_its_comment() -> None:
    """One line each, section by section."""
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.splitlines()
    assert [line.strip().partition("=")[0] for line in shown if "  # " in line] == [
        key for key in keys() if not any(other.startswith(f"{key}.") for other in keys())
    ]
    assert "  optim.lr=(must be given)  # peak learning rate" in shown
    assert "  optim.name=adamw|sgd|lion|lamb  # lamb: timm's and apex's, for large batches" in shown
    assert [line for line in shown if line.startswith("  data.crop_area=[0.08, 1.0]  # of a crop")]


def test_a_timm_model_on_a_ready_config(tmp_path: Path) -> None:
    """What the file says of another model is dropped and told in one line; what is given for the timm model counts."""
    vit = {"model": {"name": "S/16", "pooling": "gap", "positions": "sincos2d", "dropout": 0.1, "image_size": 192}}
    path, told = written(tmp_path, merged(SMALLEST, vit)), []
    config = load_config(path, ["model.name=timm:resnetv2_50x1_bit"], told.append)
    assert config.model == ModelConfig(name="timm:resnetv2_50x1_bit", dropout=0.1, image_size=192)
    name = "model.name=timm:resnetv2_50x1_bit"
    assert told == [f"{name}: model.pooling=gap, model.positions=sincos2d of {path} have no effect on it: dropped"]
    for wrong in (["model.name=timm:x", "model.patch_size=8"], ["model.name=timm:x", "model.pooling=map"]):
        with pytest.raises(ConfigError, match="has no effect on timm:x"):
            load_config(path, wrong, told.append)
    assert "model.pooling has no effect" in refusal(path, "model.name=timm:x")
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        assert load_config(recipe, ["model.name=timm:vit_small_patch16_224"], told.append).model.timm_name, recipe


def test_epochs_in_place_of_steps(tmp_path: Path) -> None:
    """The last source that gives one of the two counts; a saved config has both; a wrong number is told."""
    by_epochs = {key: value for key, value in SMALLEST.items() if key != "total_steps"} | {"total_epochs": 2.5}
    assert (config := load_config(written(tmp_path, by_epochs))).total_steps == 0 and config.total_epochs == 2.5
    assert load_config(tmp_path / "trial.yaml", ["total_steps=7"]).total_epochs is None
    config = smallest(tmp_path, "total_epochs=3", "optim.warmup_steps=101")
    assert (config.total_steps, config.total_epochs) == (0, 3)
    with pytest.raises(ConfigError, match="larger than total_steps"):
        dataclasses.replace(config, total_steps=100)
    both = dataclasses.replace(config, total_steps=200)
    (tmp_path / "saved.yaml").write_text(config_to_yaml(both))
    assert load_config(tmp_path / "saved.yaml") == both == config_from_dict(config_to_dict(both), "saved")
    assert "total_epochs is 0" in refusal(written(tmp_path, SMALLEST), "total_epochs=0")
    assert resume_differences(config_to_dict(both), dataclasses.replace(both, total_epochs=None)) == []


def test_epochs_become_steps(shard_folder: Path) -> None:
    """103 images, 13 held out, batches of 8: 1.9 epochs are 21.4 steps, rounded; 1.94 are 21.8. Others are refused."""
    values = merged(SMALLEST, {"data": {"train": str(shard_folder), "held_out": 13}})
    config = config_from_dict(values, "trial", ["total_epochs=1.9"])
    assert in_steps(config) == dataclasses.replace(config, total_steps=21) == in_steps(in_steps(config))
    assert in_steps(config_from_dict(values, "trial", ["total_epochs=1.94"])).total_steps == 22
    assert in_steps(config_from_dict(values, "trial")).total_steps == 100
    assert in_steps(config_from_dict(values, "trial", ["total_epochs=1.94", "data.subset=45"])).total_steps == 11
    with pytest.raises(ConfigError, match=r"total_steps is 24, but total_epochs \(1.9\) of 90 images are 21; give one"):
        in_steps(dataclasses.replace(config, total_steps=24))


def _train(config: Config) -> None:
    from pretrain.train.run import train

    train(config)


@pytest.mark.slow
def test_a_run_of_so_many_epochs(shard_folder: Path, tmp_path: Path) -> None:
    """It ends at the step that its epochs are, and its folder's config has both."""
    config = dataclasses.replace(tiny_config(shard_folder, tmp_path), total_steps=0, total_epochs=1.5)
    run_ranks(_train, 1, config)
    assert load_config(tmp_path / "tiny" / "config.yaml") == dataclasses.replace(config, total_steps=13)
    assert json.loads((tmp_path / "tiny" / "DONE").read_text())["step"] == 13


@pytest.mark.parametrize("text", ["optim.lr", "=3", "--optim.lr=3", "optim.=3", "optim..lr=3", "optim.lr=["])
def test_what_is_no_override_is_refused(text: str, tmp_path: Path) -> None:
    """An override is KEY=VALUE; anything else is refused with its text."""
    assert text in refusal(written(tmp_path, SMALLEST), text)


def test_later_sources_win_and_numbers_read_as_written(tmp_path: Path) -> None:
    """Defaults, then the file, then overrides in order; 1e-4 is a number and 10_000 an integer."""
    config = smallest(tmp_path, "optim.lr=1e-4", "total_steps=10_000", "total_steps=20_000", "data.crop_area=[0.2,1]")
    assert (config.optim.lr, config.total_steps, config.data.crop_area) == (1e-4, 20_000, (0.2, 1.0))
    assert (config.data.global_batch, config.data.flip) == (8, 0.5)


def test_the_written_config_reads_back_equal(tmp_path: Path) -> None:
    """config -> YAML -> config and config -> dict -> config give an equal object of plain Python types."""
    for overrides in ([], ["data.val=v", "optim.lr=3e-4", "data.crop_area=[0.3,0.9]", "model.heads=4", "init_from=w"]):
        config = smallest(tmp_path, *overrides)
        (tmp_path / "saved.yaml").write_text(config_to_yaml(config))
        assert load_config(tmp_path / "saved.yaml") == config
        assert config_from_dict(config_to_dict(config), "saved") == config
        assert type(config) is Config and type(config.model) is ModelConfig and type(config.data.crop_area) is tuple
        assert yaml.safe_load(config_to_yaml(config)) == config_to_dict(config)


def test_a_damaged_saved_config_is_refused() -> None:
    """A checkpoint's config with a wrong key, type or value is a ConfigError that names its source."""
    for change in ({"optim": {"lrr": 1}}, {"optim": {"lr": "x"}}, {"model": 3}, {"data": {"crop_area": ["a", 1]}}):
        with pytest.raises(ConfigError, match=r"^step-10: "):
            config_from_dict(merged(SMALLEST, change), "step-10")


def test_every_field_has_a_comment() -> None:
    """Each setting says what it means beside its default; model.py and sections.py stay the pages of knobs."""
    source = "".join((ROOT / "pretrain" / "config" / f"{page}.py").read_text() for page in ("model", "sections"))
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.decorator_list]
    fields = [node for cls in classes for node in cls.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(keys())
    bare = [ast.unparse(f.target) for f in fields if len(lines[(f.end_lineno or 0) - 1].partition("  # ")[2]) < 3]
    assert not bare


def test_what_a_resumed_run_may_change() -> None:
    """Machine and bookkeeping may change, everything else is told with both values."""
    assert set(MAY_CHANGE) <= set(keys())
    base = merged(SMALLEST, {"evaluation": {"fewshot_train": "few", "fewshot_test": "test"}})  # some keys need them
    base = merged(base, {"log": {"wandb_project": "trials"}})
    config = config_from_dict(base, "trial")
    saved = config_to_dict(config)
    assert resume_differences(saved, config) == []
    assert {key.partition(".")[0] for key in MAY_CHANGE}.isdisjoint({"optim", "model", "seed", "loss", "total_steps"})
    other_values: dict[Any, Any] = {bool: True, int: 7, int | None: 7, Path: "elsewhere", float | None: 2.5}
    hints = {key: hint for key, hint in _leaf_types().items() if key in MAY_CHANGE}
    for key, hint in hints.items():
        value = 3 if key == "engine.zero_stage" else 0.5 if hint is float else other_values.get(hint, "elsewhere")
        value = {"checkpoint.behind": False, "engine.compile": True}.get(key, value)
        value = {"data.order": "lanes", "engine.reduce_dtype": "fp32"}.get(key, value)
        value = [3] if key == "evaluation.fewshot_shots" else value
        change = nested(key, value)
        if key == "data.reweight":  # of a mixture only
            sets = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
            change = {"data": {"train": sets, "reweight": [{"step": 3, "weights": [2, 1]}]}}
        changed = config_from_dict(merged(base, change), "trial")
        assert changed != config, key
        assert resume_differences(saved, changed) == [], key
    changed = config_from_dict(merged(base, {"seed": 1, "optim": {"lr": 2e-3}, "data": {"flip": 0.0}}), "trial")
    assert sorted(resume_differences(saved, changed)) == [
        "data.flip: was 0.5, is 0.0",
        "optim.lr: was 0.001, is 0.002",
        "seed: was 0, is 1",
    ]


def _leaf_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        found |= _leaf_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def test_only_what_does_not_depend_on_the_end_may_be_prolonged() -> None:
    """With other schedules, or a cooldown, a longer total_steps would be another run. Shorter never works."""
    for schedule, cooldown, total_steps, allowed in [
        ("cosine", 0, 200, False),
        ("linear", 0, 200, False),
        ("rsqrt", 0, 200, True),
        ("rsqrt", 0, 99, False),
        ("rsqrt", 10, 200, False),
        ("constant", 0, 200, True),
        ("constant", 0, 99, False),
        ("constant", 10, 200, False),
        ("stair", 0, 200, True),
    ]:
        values = merged(SMALLEST, {"optim": {"schedule": schedule, "cooldown_steps": cooldown}})
        saved = config_to_dict(config_from_dict(values, "trial"))
        now = config_from_dict(merged(values, {"total_steps": total_steps}), "trial")
        assert resume_differences(saved, now) == ([] if allowed else [f"total_steps: was 100, is {total_steps}"])


def test_a_branch_may_change_its_name_its_length_and_its_rates() -> None:
    """Each of those keys is forbidden to a resume and free to a branch; any other key is forbidden to both."""
    assert set(BRANCH_MAY_CHANGE) <= set(keys()) and not set(BRANCH_MAY_CHANGE) & set(MAY_CHANGE)
    saved = config_to_dict(config_from_dict(SMALLEST, "trial"))
    schedule = {"schedule": "linear", "warmup_steps": 7, "cooldown_steps": 9, "end_lr": 1e-5, "power": 2.0}
    schedule |= {"lr": 1e-5, "weight_decay": 0.5, "clip_norm": 0.25}
    now = config_from_dict(merged(SMALLEST, {"name": "cooled", "total_steps": 90, "optim": schedule}), "trial")
    assert len(resume_differences(saved, now)) == 10
    assert resume_differences(saved, now, BRANCH_MAY_CHANGE) == []
    other = config_from_dict(merged(SMALLEST, {"seed": 1, "optim": {"average_decay": 0.5}}), "trial")
    differences = resume_differences(saved, other, BRANCH_MAY_CHANGE)
    assert sorted(differences) == ["optim.average_decay: was 0.0, is 0.5", "seed: was 0, is 1"]


def test_reading_a_config_does_not_import_torch() -> None:
    """Tools can read a config in a fraction of a second."""
    program = "import sys, pretrain.config; print(sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_printed_config_reads_back(tmp_path: Path) -> None:
    """`launch/pretrain.py --print-config` prints the complete config, overrides included, as a file that loads."""
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", str(written(tmp_path, SMALLEST))]
    done = subprocess.run([*command, "--print-config", "optim.lr=2e-3"], capture_output=True, text=True, check=True)
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "printed.yaml") == smallest(tmp_path, "optim.lr=2e-3")
    assert done.stderr == ""
    assert "total_steps: 0  # from total_epochs and the size of data.train\n" in config_to_yaml(
        smallest(tmp_path, "total_epochs=3")
    )


def test_print_config_does_not_import_torch(tmp_path: Path) -> None:
    """`launch/pretrain.py --print-config` answers before the seconds that torch takes, as its comment promises."""
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'deepspeed'} & set(sys.modules)), file=sys.stderr))\n"
        "sys.argv = ['launch/pretrain.py', '--config', sys.argv[1], '--print-config']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, str(written(tmp_path, SMALLEST))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_a_misspelt_key_ends_the_launch_at_once(tmp_path: Path) -> None:
    """Exit code 2, one line on stderr, no traceback, within seconds."""
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", str(written(tmp_path, SMALLEST))]
    start = time.monotonic()
    done = subprocess.run([*command, "optim.lrr=1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == UserError.exit_code == 2
    assert done.stderr == "error: optim.lrr=1: no such key in optim. Did you mean: 'optim.lr'?\n"
    assert done.stdout == ""
    assert time.monotonic() - start < 20


# --- configs of strangers --------------------------------------------------------------------------------------------

LARGE = {
    "300 lists": ("zz: " + "[" * 300, "nested more than 16 deep"),
    "100,000 lists": ("zz: " + "[" * 100_000, "more than 100,000 bytes"),
    "lists within the bytes": ("zz: " + "[" * 90_000, "nested more than 16 deep"),
    "sections in braces": ("zz: " + "{a: " * 300, "nested more than 16 deep"),
    "lists of dashes": ("zz:\n" + "- " * 300, "nested more than 16 deep"),
    "sections by their margins": ("\n".join(" " * n + "a:" for n in range(300)), "nested more than 16 deep"),
    "50 MB": ("#" * 50_000_000, "more than 100,000 bytes"),
    "a long word": ("zz: " + "x" * 50_000, "more than 4,096 letters"),
    "a number to the base of 60": ("seed: " + "9:" * 40_000 + "1", "more than 4,096 letters"),
    "many values": ("zz: [" + "1," * 40_000 + "]", "more than 2,000 values"),
    "an anchor that grows": (
        "a0: &a0 [x,x,x,x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n},' * 9}]\n" for n in range(9)),
        "expansion exceeds",
    ),
}


@pytest.mark.parametrize(("text", "said"), LARGE.values(), ids=LARGE.keys())
def test_a_config_too_large_is_refused_at_once(text: str, said: str, tmp_path: Path) -> None:
    """Before its parser, which has died of it (C has no RecursionError): by the number of bytes, levels, values."""
    began = time.process_time()
    assert said in refusal(written(tmp_path, yaml.safe_dump(SMALLEST) + text))
    assert time.process_time() - began < 2


CHAIN = ("output", "data.train", "data.val", "init_from", "evaluation.fewshot_train")


def chain(times: int) -> list[str]:
    """Overrides of which each names the next one so many times."""
    last = [f"{CHAIN[-1]}=" + "a" * 50]
    return [f"{here}=" + f"${{{there}}}" * times for here, there in zip(CHAIN, CHAIN[1:])] + last


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (chain(200), "more than 4,096 letters"),
        (chain(9), "references, nested ones included"),
        (["output=${output}"], "circular"),
        (["output=${data.train}", "data.train=${output}x"], "circular"),
        (["data.train=${data}"], "circular"),
        (["data.train=${.val}", "data.val=${.train}"], "circular"),
        (["zz=" + "[" * 100_000], "nested more than 16 deep"),
        (["a." * 5000 + "b=1"], "nested more than 16 deep"),
        (["name=" + "x" * 200_000], "more than 100,000 bytes"),
        (["name=" + "${" * 5000], "more than 4,096 letters"),
        (["name=" + "${" * 900], "not a valid value"),
        (["optim.lr=1" + "0" * 400], "too large"),
        (["optim.lr=!!float ''"], "not a valid value"),
        (["seed=!!bool x"], "not a valid value"),
        (["seed=!!timestamp x"], "not a valid value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_overrides_are_refused_at_once(overrides: list[str], said: str, tmp_path: Path) -> None:
    """References that multiply, circles, depth, length, and tags at which PyYAML stumbles: one short line."""
    began = time.process_time()
    message = refusal(written(tmp_path, SMALLEST), *overrides)
    assert said in message and len(message) < 1000
    assert time.process_time() - began < 2


def test_references_in_measure_are_followed(tmp_path: Path) -> None:
    """Through several values, to a value beside one's own, and twice in one value."""
    overrides = [
        "output=/x/${name}",
        "init_from=${output}/${output}",
        "data.train=${.val}/t",
        "data.val=${..init_from}",
    ]
    config = smallest(tmp_path, *overrides)
    assert (str(config.init_from), str(config.data.train)) == ("/x/trial/x/trial", "/x/trial/x/trial/t")


def test_a_dict_of_json_has_the_same_limits() -> None:
    """Such as a checkpoint's state.json holds: depth, number, letters, references."""
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    for value in (deep, [1] * 5000, "x" * 5000, "${a}" * 2000):
        with pytest.raises(ConfigError, match="nested|values|letters"):
            config_from_dict({**SMALLEST, "init_from": value}, "state.json")


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EIO, StorageError), (errno.ESTALE, StorageError), (errno.ENOENT, ConfigError), (errno.EACCES, ConfigError)],
)
def test_a_disk_that_is_away_is_no_wrong_key(
    number: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 would end a job for good; a file that is not there, or may not be read, needs a person."""

    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(error, match=rf"tiny.yaml: cannot be read .*(?i:{os.strerror(number)})"):
        load_config(tmp_path / "tiny.yaml")


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it alone behind `key=`, and YAML knows nothing of it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = {"output": "~/runs", "data": {"train": [{"path": "~/one", "weight": 1}, {"path": "two~", "weight": 1}]}}
    config = config_from_dict(merged(SMALLEST, changes), "trial", ["data.val=~/val"])
    assert (config.output, config.data.val) == (tmp_path / "runs", tmp_path / "val")
    assert [source.path for source in config.data.sources] == [tmp_path / "one", Path("two~")]
