"""Machines of the model: GPUs as their data sheets have them, nothing measured, and what is assumed of a node.

Bandwidths are bytes per second in one direction. `reached` says what share of them is assumed to be had; give your own
numbers with --machine-file FILE.json (keys as below). `python -m wsss_dist.scaling rates` writes such a file, with
`reached` 1, since it measures what is had: a bandwidth that it has not measured is then all that the data sheet says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from wsss_dist.benchmark.flops import PEAKS
from wsss_dist.errors import UserError

# assumed of networks of matrix products, the ViTs, and of convolutional ones, whose kernels are further from the peak
MFU = {"products": 0.4, "convolutions": 0.2}


@dataclass(frozen=True)
class Machine:
    """One node of a cluster, and how much of its peaks is reached.

    name          a key of PEAKS of benchmark/flops.py, or a word of your own where `peak` is given.
    peak          operations per second; None: the data sheet's, by precision.
    mfu           share of the peak that a step reaches, its slowest parts included; None: MFU, by kind of network.
    memory        bytes/s of a GPU's memory, for the optimiser.
    gpus          GPUs of a node, one rank each.
    intra, inter  bytes/s: of a GPU to the others of its node; of all network cards of a node together.
    reached       share of these two.
    hop_intra, hop_inter  seconds of one message.
    images_per_worker     training samples a second of one loader worker.
    workers       loader workers of a rank.
    disk          bytes/s that rank 0 writes to the shared file system; `sha` checksums, on one core.
    """

    name: str
    peak: float | None = None
    mfu: float | None = None
    memory: float = 2.0e12
    gpus: int = 8
    intra: float = 300e9
    inter: float = 200e9
    reached: float = 0.8
    hop_intra: float = 3e-6
    hop_inter: float = 8e-6
    images_per_worker: float = 100.0
    workers: int = 8
    disk: float = 1e9
    sha: float = 1e9

    def flops_per_s(self, arithmetic: str, convolutions: bool) -> float:
        """Operations per second that are assumed to be reached by a network, in fp32, tf32 or bf16."""
        mfu = MFU["convolutions" if convolutions else "products"] if self.mfu is None else self.mfu
        return mfu * (PEAKS[self.name.split(" ")[0]][arithmetic] * 1e12 if self.peak is None else self.peak)

    @property
    def assumed(self) -> str:
        """The share of the peak, in words."""
        if self.mfu is not None:
            return f"MFU {self.mfu:g}"
        return f"MFU {MFU['products']:g}, of convolutional networks {MFU['convolutions']:g}"


# NVIDIA data sheets: memory, NVLink (half of the sum of both directions), and the network cards of a DGX of that
# generation: 8 x 200 Gbit/s (A100), 8 x 400 Gbit/s (H100, H200). mfu, reached and the hops are assumptions.
MACHINES = {
    "A100": Machine("A100", memory=2.0e12, intra=300e9, inter=200e9),
    "H100": Machine("H100", memory=3.35e12, intra=450e9, inter=400e9),
    "H200": Machine("H200", memory=4.8e12, intra=450e9, inter=400e9),
}


def load_machine(name: str, file: Path | None = None, **changes: float | None) -> Machine:
    """A machine of MACHINES, or of a JSON file, with changes.

    Raises:
        UserError: no such machine, a key that is none, or a file with a name of its own and no `peak`.
    """
    values = {k: v for k, v in changes.items() if v is not None}
    if file is not None:
        values = {"name": name, **json.loads(file.read_text()), **values}
    unknown = sorted(set(values) - {f.name for f in fields(Machine)})
    if unknown:
        known = ", ".join(f.name for f in fields(Machine))
        raise UserError(f"scaling: '{unknown[0]}' is no key of a machine; expected some of {known}")
    if file is not None and values.get("peak"):
        return Machine(**values)
    if name not in MACHINES:
        known = ", ".join(MACHINES)
        raise UserError(f"scaling: '{name}' is no machine; expected one of {known}, or --machine-file FILE")
    if (own := values.get("name", name)).split(" ")[0] not in PEAKS:
        raise UserError(
            f"scaling: {file} calls the machine '{own}', of which no data sheet is known; add its 'peak' in operations "
            f"per second, or remove 'name' and choose with --machine among {', '.join(MACHINES)}"
        )
    return replace(MACHINES[name], **values)
