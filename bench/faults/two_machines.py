"""Does training survive the loss of a machine? A rehearsal of two machines on this one; needs root and iproute2.

    python -m bench.faults.two_machines
    python -m bench.faults.two_machines --rendezvous static

The machines are network namespaces, joined by a pair of virtual Ethernet devices, each with a host name and a torchrun
of its own. They train a tiny network for 20 steps. Half way everything on the second one is killed, and then its
torchrun is started again, as Slurm or an operator would. The run must end with the step and the exit status of one that
was left alone. Logs are in the folder. The commands are those of docs/cluster.md.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal

from bench.harness.command_line import run_from_shell
from tgmae.shapes.scenes import make_shapes
from tgmae.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
PORT = 29501
# A network of .3 M parameters, whose steps are long enough to be interrupted.
TINY = (
    "--pipeline", "pyav", "--device", "cpu", "--batch-size", "4", "--device-batch-size", "2", "--epochs", "1000",
    "--model.image-size", "64", "--model.patch-size", "8", "--model.num-frames", "8", "--model.width", "96",
    "--model.depth", "2", "--model.decoder-width", "24", "--model.decoder-depth", "1", "--mask.kind", "tube",
    "--mask.ratio", "0.75", "--validation.every", "0", "--log.checkpoint-every", "2", "--log.metrics-every", "1",
    "--log.picture-every", "1000", "--log.no-tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    folder: Path = Path("runs/two_machines")  # for the run and the logs
    manifest: Path | None = None  # of videos to train on; by default shapes that are made here
    # How the two torchrun find each other: c10d learns of a new machine, static has their number in its flags.
    rendezvous: Literal["c10d", "static"] = "c10d"
    steps: int = 20
    flags: tuple[str, ...] = ()  # further ones of tgmae-train
    lose: bool = True  # kill the second machine half way
    timeout_s: float = 240.0


@dataclass
class Machine:
    """A network namespace with a host name; `started` are the programs in it."""

    name: str
    namespace: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a program on this machine, with its output in a file."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *named], stdout=log, stderr=log, env=environment
        )
        self.started.append(process)
        return process

    def lose(self) -> None:
        """Kill everything on this machine, at once and without warning."""
        for process in _run("ip", "netns", "pids", self.namespace).split():
            os.kill(int(process), signal.SIGKILL)
        for child in self.started:
            child.wait()


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Make two machines that see each other, and remove them in the end. Raises OSError where that is not permitted."""
    number = os.getpid()
    machines = [Machine(name, f"tgmae-{name}-{number}") for name in ADDRESSES]
    device = {machine.name: f"tg{machine.name[-1]}{number}" for machine in machines}
    with ExitStack() as stack:
        for machine in machines:
            _run("ip", "netns", "add", machine.namespace)
            stack.callback(_run, "ip", "netns", "delete", machine.namespace)
            # `ip netns exec` shows the files of this folder in /etc.
            etc = Path("/etc/netns") / machine.namespace
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            hosts = {"localhost": "127.0.0.1", **ADDRESSES}
            (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        first, second = device.values()
        _run("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for machine in machines:
            stack.callback(machine.lose)
            name = device[machine.name]
            _run("ip", "link", "set", name, "netns", machine.namespace)
            _run("ip", "-n", machine.namespace, "address", "add", f"{ADDRESSES[machine.name]}/24", "dev", name)
            for link in (name, "lo"):
                _run("ip", "-n", machine.namespace, "link", "set", link, "up")
        yield machines


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise OSError(f"{command[0]} is missing; apt-get install iproute2 installs it")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}; two machines can be rehearsed as root only")
    return done.stdout


def make_command(options: Options, manifest: Path, number: int) -> list[str]:
    """Return what is typed on machine `number` (docs/cluster.md)."""
    meet = {
        "c10d": f"--rdzv-backend c10d --rdzv-endpoint node-a:{PORT} --rdzv-id rehearsal",
        "static": f"--node-rank {number} --master-addr {ADDRESSES['node-a']} --master-port {PORT}",
    }[options.rendezvous]
    launcher = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 3 {meet}"
    return [sys.executable, *launcher.split(), *make_run(options, manifest, options.folder / "run")]


def make_run(options: Options, manifest: Path, run_dir: Path) -> list[str]:
    """Return what torchrun is given to run."""
    paths = ["--data.manifest", str(manifest), "--run-dir", str(run_dir)]
    return ["-m", "tgmae.cli.train", *TINY, *paths, "--max-steps", str(options.steps), *options.flags]


def rehearse(options: Options) -> list[float]:
    """Train on two machines; return the seconds until the second was lost and until the run had ended.

    Raises OSError where machines cannot be rehearsed, and ValueError where the run failed.
    """
    manifest, deadline = options.manifest, time.monotonic() + options.timeout_s
    options.folder.mkdir(parents=True, exist_ok=True)
    if manifest is None:
        manifest = options.folder / "shapes" / "manifest.parquet"
        make_shapes(manifest.parent, count=24, seed=7, codec="h264", num_objects=1, num_workers=2)
    manifest = manifest.absolute()
    options = replace(options, folder=options.folder.absolute())
    started, times = time.monotonic(), []
    with two_machines() as machines, ExitStack() as logs:

        def start(number: int, log: str) -> subprocess.Popen[bytes]:
            file = logs.enter_context((options.folder / log).open("wb"))
            return machines[number].start(make_command(options, manifest, number), file)

        processes = [start(0, "node-a.log"), start(1, "node-b.log")]
        if options.lose:
            while not any(line["step"] >= options.steps // 4 for line in read_metrics(options.folder / "run")):
                if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
                    raise ValueError(f"the run did not get to step {options.steps // 4}; see {options.folder}/*.log")
                time.sleep(0.02)
            machines[1].lose()
            times.append(time.monotonic() - started)
            processes[1] = start(1, "node-b.again.log")
        for process in processes:
            try:
                code = process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                raise ValueError(f"torchrun ended with {code}; see {options.folder}/*.log")
        times.append(time.monotonic() - started)
    return times


def run(options: Options) -> None:
    times = rehearse(options)
    last = read_metrics(options.folder / "run")[-1]
    if last["step"] != options.steps:
        raise ValueError(f"the run ended at step {last['step']} of {options.steps}; see {options.folder}/*.log")
    lost = f"lost the second machine after {times[0]:.0f} s, " if options.lose else ""
    print(f"{lost}ended at step {last['step']} with loss {last['loss']:.4f} after {times[-1]:.0f} s")


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
