"""How a latent becomes frames: which policy, and how much memory it may take. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_i2v.errors import RequestError

GIB = 2**30


@dataclass(frozen=True)
class Policy:
    """What a group norm and the attention look at: the tile they are in, or the whole clip.

    moments, attention: "tile" or "global". With tiles, each is decoded as if it were the video, and neighbours are
    faded into each other as the reference does. With "global" there are no tiles to see: one set of moments, no fades.
    measures: passes that measure the norms of the last stages before the pass that emits frames, where those stages'
    tensors are too large to keep; None: as many as make it exact.
    """

    name: str
    moments: str
    attention: str
    measures: int | None = None


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("reference", moments="tile", attention="tile"),
        Policy("seamless", moments="global", attention="global", measures=1),
    )
}


def policy_of(name: str) -> Policy:
    """Raises RequestError for an unknown name."""
    if name not in POLICIES:
        raise RequestError(f"decode policy {name!r} is not known", f"Use one of {', '.join(sorted(POLICIES))}.")
    return POLICIES[name]


@dataclass(frozen=True)
class DecodeChunking:
    """Memory that decoding may take.

    device_bytes: on the device, weights included; host_bytes: in RAM, for tensors that do not fit on the device.
    frames: most frames of a chunk; more only help small pictures.
    """

    device_bytes: int = int(2.86 * GIB)
    host_bytes: int = 8 * GIB
    frames: int = 8

    def smaller(self) -> DecodeChunking:
        """Three quarters of the device memory, for another try after running out."""
        return DecodeChunking(self.device_bytes * 3 // 4, self.host_bytes, self.frames)
