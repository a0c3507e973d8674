"""A world of three short scenes, and the settings that turn configs/synthetic_tiny.yaml into a run of seconds."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import test as test_script
import train as train_script
from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config, to_tree
from cmt_aqr.synthetic import WorldSettings, generate_world
from cmt_aqr.training.checkpoint import save_checkpoint

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "synthetic_tiny.yaml"
# What cmt_aqr.progress writes about a task of more than three seconds.
PHASE = re.compile(r"( \.\.\.|: done in [0-9:]+|, remaining [0-9:?]+)\n$")
WORLD = {
    "seed": 3,
    "samples_per_scene": 3,
    "image_size": [128, 72],
    "sweeps_per_keyframe": 1,
    "lidar_columns": 128,
}
SMALL = (
    "data.num_sweeps=1",
    "data.workers=0",
    "data.synthetic.train_scenes=2",
    "data.synthetic.val_scenes=1",
    *(f"data.synthetic.{key}={value}" for key, value in WORLD.items()),
    "data.synthetic.workers=0",
    "model.hidden_dim=16",
    "model.num_queries=80",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn_dim=32",
    "model.depth_bins=4",
    "model.head_channels=16",
    "model.lidar.voxel_size=[1.6,1.6,0.8]",
    "model.lidar.sparse_shape=[11,64,64]",
    "model.camera.input_size=[32,96]",
    "model.camera.base_channels=8",
    "model.denoising.num_dn=80",
    "model.attention.backend=dense",
    "training.epochs=2",
    "training.batch_size=2",
    "training.lr_mult={}",
    "training.log_every=1",
    "training.save_every=1",
    "training.eval_every=2",
    "training.keep_checkpoints=2",
    "evaluation.max_detections=40",
    "evaluation.num_pictures=2",
)
# The same without AQR, which a model with one sensor must be.
PLAIN = ("model.aqr=null", "training.decay_mult={}")


@dataclass(frozen=True)
class Result:
    """What a script left: its exit status and its two streams."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """A written world; `settings` are the overrides that train on it."""

    root: Path
    settings: tuple[str, ...]

    def copy(self, folder: Path) -> "World":
        """The same world elsewhere, to break it."""
        root = folder / "world"
        shutil.copytree(self.root, root)
        return World(root, (*SMALL, f"data.root={root}", f"data.index_dir={folder / 'index'}"))

    def arguments(self, *arguments: str, settings: tuple[str, ...] = (), config: Path = CONFIG) -> list[str]:
        """Command line of a script; `settings` come after the world's own and win."""
        return [str(config), "--device", "cpu", *map(str, arguments), "--set", *self.settings, *settings]

    def command(self, script: str, *arguments: str, settings: tuple[str, ...] = (), processes: int = 1) -> list[str]:
        """The program to start for :meth:`arguments`."""
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [*start, str(REPOSITORY / script), *self.arguments(*arguments, settings=settings)]

    def run(self, script: str, *arguments: str, settings: tuple[str, ...] = (), processes: int = 1) -> Result:
        """Run a script as a user does."""
        done = subprocess.run(
            self.command(script, *arguments, settings=settings, processes=processes),
            capture_output=True,
            text=True,
            timeout=240,
            env=one_thread(),
        )
        # How long a phase takes is a matter of the machine.
        err = "".join(line for line in done.stderr.splitlines(keepends=True) if not PHASE.search(line))
        return Result(done.returncode, done.stdout, err)


def one_thread() -> dict[str, str]:
    """Environment in which sums are added in one order."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def read_lines(path: Path, kind: str) -> list[dict]:
    """Lines of one kind of a log.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def world_settings() -> WorldSettings:
    """Two scenes to train on, one to validate on."""
    return WorldSettings(scenes=2, val_scenes=1, **WORLD | {"image_size": tuple(WORLD["image_size"])})


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """The world of this session; tests do not change it."""
    folder = tmp_path_factory.mktemp("e2e")
    root = folder / "world"
    generate_world(root, world_settings(), progress=False)
    return World(root, (*SMALL, f"data.root={root}", f"data.index_dir={folder / 'index'}"))


@pytest.fixture
def call(monkeypatch, capfd):
    """Run train.py or test.py inside this process: ``call("train", *command line)`` -> Result."""
    scripts = {"train": train_script, "test": test_script}

    monkeypatch.setattr("cmt_aqr.progress.PATIENCE", 1000.0)

    def run(script: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capfd.readouterr()
        status = scripts[script].main()
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the small model, random weights, as train.py writes them."""
    config = load_config(CONFIG, SMALL)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    save_checkpoint(path, {"config": to_tree(config), "model": build_detector(config.model).state_dict()})
    return path
