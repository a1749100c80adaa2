"""The commands around weights: convert, inspect, verify. Flags become values here; `cli` has the other commands.

Invariant: as in `cli`, nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_i2v.console import Console
from lowvram_i2v.errors import RequestError
from lowvram_i2v.variant import VARIANTS

if TYPE_CHECKING:
    from lowvram_i2v.convert.origin import Origin

COMPONENT_NAMES = {"transformer": "transformer", "text": "text_encoder", "clip": "text_encoder_2", "vae": "vae"}
SCHEMES = ("int8", "fp8", "nf4", "bf16", "fp32")
FORMATS = ("model", "quanto", "diffusers", "official")
PIECES = {
    "transformer": "the transformer",
    "text-encoder": "LLaVA, or its language model alone",
    "vision": "LLaVA's vision tower, where --text-encoder has none",
    "text-encoder-2": "CLIP-L",
    "vae": "the VAE",
    "tokenizer": "folder with LLaVA's tokenizer.json",
    "tokenizer-2": "folder with CLIP's tokenizer",
}
CONVERT_HELP = """\
examples:
  lowvram-i2v convert ckpts model                                    the released tree
  lowvram-i2v convert --from-comfy ComfyUI/models model              what ComfyUI has already
  lowvram-i2v convert hunyuan_i2v_fp8_scaled.safetensors model       one file; what it is, its content says
  lowvram-i2v convert --transformer A.gguf --vae B.safetensors model
"""


def add_commands(commands: Any) -> None:
    _add_convert(commands)
    _add_inspect(commands)
    _add_verify(commands)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn downloaded weights into a model folder",
        usage="lowvram-i2v convert [flags] [SOURCE] DIR",
        epilog=CONVERT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_convert)
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="[SOURCE] DIR", help="a folder or file of weights; the folder to write")
    add("--from-comfy", type=Path, metavar="DIR", help="ComfyUI's models folder, instead of SOURCE")
    for name, what in PIECES.items():
        add(f"--{name}", type=Path, metavar="PATH", help=f"{what}; wins over SOURCE")
    add("--scheme", choices=SCHEMES, help="how the transformer is stored (default int8); fp32 is for tests")
    add("--text-scheme", choices=SCHEMES, help="how the text encoder is stored (default fp8 beside 8 and 4 bits)")
    add("--keep", action="append", default=[], metavar="PATTERN", help="layers to leave unquantized (repeatable)")
    add_component(parser)
    add("--variant", choices=VARIANTS, help="needed only where the weights leave it open")
    add("--format", choices=FORMATS, default="model", help="model, or an export for others (default %(default)s)")
    add("--device", default="auto", metavar="NAME", help="where weights are quantized (default %(default)s)")


def add_component(parser: argparse.ArgumentParser) -> None:
    """`--component`, as all commands have it that work on one at a time."""
    only = "only this one (repeatable): %(choices)s"
    parser.add_argument("--component", action="append", metavar="NAME", choices=COMPONENT_NAMES, help=only)


def _convert(options: argparse.Namespace) -> int:
    from lowvram_i2v.device import pick_device

    origin, destination = _origin(options)
    components = [COMPONENT_NAMES[name] for name in options.component] if options.component else None
    if options.format != "model":
        from lowvram_i2v.convert.export import export

        export(origin, destination, options.format, components, options.variant, Console())
    else:
        from lowvram_i2v.convert.convert import DEFAULT_SCHEME, convert

        convert(
            origin,
            destination,
            options.scheme or DEFAULT_SCHEME,
            components,
            options.variant,
            Console(),
            text_scheme=options.text_scheme,
            keep=options.keep,
            device=pick_device(options.device),
        )
    print(destination)
    return 0


def _origin(options: argparse.Namespace) -> tuple[Origin, Path]:
    """Where weights come from, and where they go."""
    from lowvram_i2v.convert.origin import COMFY, Origin, layout_of
    from lowvram_i2v.convert.sources.pieces import Pieces

    *sources, destination = options.paths
    pieces = Pieces(**{name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in PIECES})
    if options.from_comfy is not None:
        if not options.from_comfy.is_dir() or layout_of(options.from_comfy) != COMFY:
            raise RequestError(
                f"{options.from_comfy} is not ComfyUI's models folder",
                "It contains diffusion_models/, text_encoders/, clip_vision/ and vae/.",
            )
        sources.append(options.from_comfy)
    if len(sources) > 1:
        raise RequestError(f"{len(sources)} sources given: {', '.join(map(str, sources))}", "Give one, then DIR.")
    if not sources and pieces == Pieces():
        raise RequestError("only one path given", "Say `lowvram-i2v convert SOURCE DIR`.")
    return Origin(sources[0] if sources else None, pieces), destination


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="say what files of weights are, and what convert would do with them")
    parser.set_defaults(command=_inspect)
    parser.add_argument("path", type=Path, metavar="PATH", help="a file, a folder, or a model folder")


def _inspect(options: argparse.Namespace) -> int:
    from lowvram_i2v.convert.inspect import inspect

    for line in inspect(options.path):
        print(line)
    return 0


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="check a model folder's files, and their distance from the source")
    parser.set_defaults(command=_verify)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the model folder")
    add("--against", type=Path, metavar="SOURCE", help="what it was converted from: errors of every layer")
    add_component(parser)
    add("--variant", choices=VARIANTS, help="of SOURCE, where it leaves that open")
    add("--rows", type=int, default=20, metavar="N", help="layers in the table, the worst ones (default %(default)s)")
    add("--device", default="auto", metavar="NAME", help="where the block runs (default %(default)s)")


def _verify(options: argparse.Namespace) -> int:
    from lowvram_i2v.convert.verify import verify
    from lowvram_i2v.device import pick_device

    components = [COMPONENT_NAMES[name] for name in options.component] if options.component else None
    report = verify(
        options.folder, options.against, components, options.variant, pick_device(options.device), Console()
    )
    for line in report.lines(options.rows):
        print(line)
    if not report.damaged:
        return 0
    print(f"lowvram-i2v: damaged: {len(report.damaged)}; convert again", file=sys.stderr)
    return 1
