"""Shows that two states of the training code give the same bits: `python docs/same_code.py OLD_COMMIT [--steps 12]`.

A change of the core makes every published record stale, though most changes move no bit. This takes the published
records, one of every distinct set of components and switches, and trains the first steps of each by the code of
OLD_COMMIT, checked out in a temporary worktree, and by the code of this checkout: on this CPU, in float32. Where every
loss, every gradient norm, every held-out score and the final weights are the same to the bit, the pairs of code hashes
are added to kimi_nb/study/equal_code.json, which the package reads; where one is not, it is named and nothing is
written. Both states make their own tokens, so the code that reads data is compared too. A clean checkout is asked for:
what is shown is shown of a commit.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SWITCHES = (  # settings with numbers of which none or 0 is another path through the code
    "model.attention.q_lora_rank", "model.first_dense_layers", "model.moe.n_shared_experts",
    "model.moe.seq_loss_weight", "model.moe.d_expert", "model.moe.latent_dim", "model.mtp_depth", "model.dropout",
    "train.grad_clip", "train.warmup_steps", "train.optimizer.weight_decay",
)  # fmt: skip
OVER_ONE = ("model.moe.n_group", "model.position.yarn_factor")  # the same for 1
SCORED = 2048  # tokens of held-out text


def git(*args, cwd=REPO) -> str:
    """What git says."""
    return subprocess.run(["git", *args], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def published_configs() -> list[dict]:
    """The settings of every published record that is not of this checkout's code."""
    from kimi_nb.plan import published, published_profiles

    records = (record for profile in published_profiles() for record in published(profile).records())
    return [record.config for record in records if record.stale]


def kind_of(config: dict) -> str:
    """All that chooses a path through the code: words, switches, and numbers that are there or not."""
    from kimi_nb.config import RunConfig
    from kimi_nb.study import asked_for

    run = RunConfig(**config)
    asleep = run.dormant()
    found = dict(asked_for(config))
    for path, value in run.flat().items():
        if path in asleep or path.startswith("data.max"):
            continue
        if isinstance(value, (str, bool)):
            found[path] = value
        elif path in (*SWITCHES, *OVER_ONE):
            found[path] = (value or 0) > (path in OVER_ONE)
    return json.dumps(found, sort_keys=True)


def distinct(configs: list[dict]) -> list[dict]:
    """One of every kind, the first; runs that are not trained show nothing."""
    found = {}
    for config in configs:
        if config["train"]["steps"]:
            found.setdefault(kind_of(config), config)
    return list(found.values())


def train(configs: list[dict], steps: int) -> list[dict]:
    """What the code of this process gives: hash, and digests of the first steps."""
    import torch

    from kimi_nb.config import RunConfig
    from kimi_nb.data import prepare
    from kimi_nb.study import code_hash
    from kimi_nb.train import Trainer

    torch.set_num_threads(1)
    found = []
    for i, config in enumerate(configs):
        here = {"train.precision": "fp32", "train.compile": False, "train.eval_tokens": SCORED}
        run = RunConfig(**config).changed(here)
        trainer = Trainer(run, prepare(run.data), torch.device("cpu"))
        lines = [trainer.step(step) for step in range(min(steps, run.train.steps))]
        scores = trainer.evaluate("val")
        weights = hashlib.sha256()
        for name, value in sorted(trainer.model.state_dict().items()):
            weights.update(name.encode() + value.contiguous().numpy().tobytes())
        numbers = [[line["train_loss"].hex(), line["grad_norm"].hex()] for line in lines]
        scored = {k: v.hex() for k, v in scores.items() if isinstance(v, float) and "second" not in k}
        found.append(dict(hash=code_hash(config), numbers=numbers, scores=scored, weights=weights.hexdigest()))
        print(f"{i + 1} of {len(configs)}: {numbers[-1]}", file=sys.stderr, flush=True)
    return found


def trained_by(tree: Path, configs: list[dict], steps: int, folder: Path) -> list[dict]:
    """`train` in a process that has the package of `tree`."""
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps(configs), encoding="utf-8")
    worker = [sys.executable, __file__, "--train", str(folder), "--steps", str(steps)]
    env = os.environ | dict(PYTHONPATH=str(tree), KIMI_NB_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    subprocess.run(worker, check=True, env=env, cwd=tree)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def differences(configs: list[dict], old: list[dict], new: list[dict]) -> list[str]:
    """A line for every run whose two results are not the same to the bit."""
    lines = []
    for config, before, after in zip(configs, old, new, strict=True):
        parts = [name for name in ("numbers", "scores", "weights") if before[name] != after[name]]
        if parts:
            steps = [i for i, pair in enumerate(zip(before["numbers"], after["numbers"])) if pair[0] != pair[1]]
            first = f", from step {steps[0] + 1} on" if steps else ""
            lines.append(f"{', '.join(parts)} differ{first}: {kind_of(config)}")
    return lines


def processor() -> str:
    """The name of this machine's processor, and PyTorch's version."""
    import torch

    from kimi_nb.train import environment, pick_device

    return f"{environment(pick_device('cpu'))['device_name']}, PyTorch {torch.__version__.partition('+')[0]}"


def write(old_commit: str, steps: int, old: list[dict], new: list[dict]):
    """Add what was shown to the package's own file."""
    from kimi_nb.config import write_file
    from kimi_nb.study import equal_code_file, seal, unseal

    file = equal_code_file()
    shown = unseal(file.read_text(encoding="utf-8"), str(file))["shown"] if file.is_file() else []
    pairs = sorted({(a["hash"], b["hash"]) for a, b in zip(old, new) if a["hash"] != b["hash"]})
    about = dict(
        commits=[old_commit, git("rev-parse", "HEAD")],
        pairs=[list(pair) for pair in pairs],
        python=platform.python_version(),
        runs=len(new),
        steps=steps,
        where=processor(),
    )
    write_file(file, seal(dict(format="kimi_nb equal code 1", shown=[*shown, about])))
    print(f"{file}: {len(pairs)} pairs of hashes, shown by {len(new)} runs of {steps} steps")


def compare(old_commit: str, steps: int, most: int | None) -> int:
    """Train under both states and write what was shown; 1 where something differs."""
    if git("status", "--porcelain", "--untracked-files=no"):
        print("the checkout has local changes: commit them first", file=sys.stderr)
        return 2
    old_commit = git("rev-parse", f"{old_commit}^{{commit}}")
    configs = distinct(published_configs())[:most]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        git("worktree", "add", "--detach", str(tree), old_commit)
        try:
            old = trained_by(tree, configs, steps, Path(folder) / "a")
            new = trained_by(REPO, configs, steps, Path(folder) / "b")
        finally:
            git("worktree", "remove", "--force", str(tree))
    lines = differences(configs, old, new)
    if lines:
        print(f"{len(lines)} of {len(configs)} runs are not the same:", *lines, sep="\n", file=sys.stderr)
        return 1
    write(old_commit, steps, old, new)
    return 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("old", nargs="?", metavar="OLD_COMMIT")
    p.add_argument("--steps", type=int, default=12, help="first steps of every run (default: 12)")
    p.add_argument("--most", type=int, help="at most so many runs: for a trial")
    p.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.train:
        configs = json.loads((args.train / "configs.json").read_text(encoding="utf-8"))
        found = train(configs, args.steps)
        (args.train / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    if not args.old:
        p.error("name the commit whose code is compared with this checkout's")
    return compare(args.old, args.steps, args.most)


if __name__ == "__main__":
    sys.exit(main())
