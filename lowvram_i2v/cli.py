"""The command line: flags become frozen values, events become lines, errors become messages.

Invariants: nothing heavy is imported before a command runs, so `--help` answers at once; `LowVramError` is caught here
and nowhere else; the output stream holds results only.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from lowvram_i2v import __version__
from lowvram_i2v.cli_convert import COMPONENT_NAMES, add_commands, add_component
from lowvram_i2v.cli_kernels import add_commands as add_kernel_commands
from lowvram_i2v.cli_media import add_commands as add_media_commands
from lowvram_i2v.cli_plan import add_commands as add_plan_commands
from lowvram_i2v.console import Console
from lowvram_i2v.demo_model import ADVICE, FRAMES, STEPS, is_demo, model_path, shipped, size_for
from lowvram_i2v.errors import LowVramError, RequestError
from lowvram_i2v.events import Notice
from lowvram_i2v.profile import DEFAULT_PROFILE
from lowvram_i2v.request import RESOLUTIONS, GenerateRequest, buckets
from lowvram_i2v.variant import VARIANTS

PROMPT_ADVICE = """\
prompts: say it briefly. Name the subject, the action, the background and the camera; a short prompt keeps the motion
that you name, a long one dilutes it and may switch scenes. Example:
  "A woman turns her head and smiles, park in autumn behind her, the camera moves in slowly."
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 1 refused with a message, 2 unknown flags, 130 interrupted."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        status = command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads on: `| head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the interpreter's last flush
        return 1
    except LowVramError as error:
        print(f"lowvram-i2v: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlowvram-i2v: interrupted; nothing half-written was left", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Wrong flags are told in one line, not below a page of usage. Commands' parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n  `{self.prog} --help` lists the flags.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("lowvram-i2v", description="HunyuanVideo-I2V on the GPUs that people own.")
    parser.add_argument("--version", action="version", version=f"lowvram-i2v {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    add_commands(commands)
    _add_synth(commands)
    _add_demo(commands)
    add_plan_commands(commands, _size)
    add_media_commands(commands)
    add_kernel_commands(commands)
    return parser


def _add_generate(commands: Any) -> None:
    default = GenerateRequest(Path(), "", Path())
    parser = commands.add_parser(
        "generate",
        help="make a video from a picture and a prompt",
        epilog=PROMPT_ADVICE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_generate)
    add = parser.add_argument
    add(
        "--model",
        type=model_path,
        metavar="DIR",
        help="model folder, as `convert` writes it; demo (default) is the small one in the package",
    )
    add("--image", type=Path, metavar="FILE", help="the picture that becomes the first frame")
    add("--prompt", metavar="TEXT", help="what happens in the video (see below)")
    add("--output", type=Path, required=True, metavar="FILE.mp4")
    add(
        "--like",
        type=Path,
        metavar="FILE.mp4",
        help="repeat this video's settings; other flags given win over them",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--resolution",
        choices=RESOLUTIONS,
        help=f"size class; the picture's ratio decides (default {default.resolution})",
    )
    size.add_argument(
        "--size",
        type=_size,
        metavar="WxH",
        help="exact size in pixels, multiples of 16, instead of --resolution",
    )
    add("--frames", type=int, metavar="N", help=f"4n+1 (default {default.frames})")
    add("--steps", type=int, metavar="N", help=f"denoising steps (default {default.steps})")
    add(
        "--flow-shift",
        type=float,
        metavar="X",
        help="of the noise schedule (default 7 with --stability, 17 without)",
    )
    stability = parser.add_mutually_exclusive_group()
    stability.add_argument("--stability", action="store_true", default=None, help="steadier video (default)")
    stability.add_argument("--dynamic", dest="stability", action="store_false", help="more motion, less steady")
    add("--guidance", type=float, metavar="X", help="embedded guidance (default 6, where the weights have it)")
    add(
        "--cfg",
        type=float,
        metavar="X",
        help="true classifier-free guidance, twice the time a step (default 1: off)",
    )
    add("--negative-prompt", metavar="TEXT", help="what to avoid; counts only with --cfg above 1")
    add("--seed", type=int, metavar="N", help="same seed, same noise on every card (default: random, printed)")
    add("--fps", type=int, metavar="N", help=f"of the mp4 (default {default.fps})")
    add(
        "--profile",
        metavar="NAME",
        help=f"see `lowvram-i2v profiles` (default: that of --like, else {DEFAULT_PROFILE})",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N (default %(default)s)")
    add("--preview", type=int, default=0, metavar="N", help="a small animated picture beside the output every N steps")
    add("--preview-vae", type=Path, metavar="FILE", help="TAEHV's weights, for better previews")
    add("--no-cache", action="store_true", help="neither keep nor use encoded prompts and pictures")


def _generate(options: argparse.Namespace) -> int:
    from lowvram_i2v.device import describe, pick_device
    from lowvram_i2v.profile import load_profile

    console = Console()
    request, model, profile_name = _request(options)
    _check_preview(options)
    try:
        profile = load_profile(options.profile or profile_name or DEFAULT_PROFILE)
    except RequestError:
        if options.profile is not None:
            raise
        profile = load_profile(DEFAULT_PROFILE)
        console(Notice(f"{options.like} was made with profile {profile_name}, which is not known here."))
    device = pick_device(options.device)
    console(Notice(f"{describe(device)}; profile {profile.name}; seed {request.seed}"))
    if is_demo(model):
        console(Notice(ADVICE))

    from lowvram_i2v.embed_cache import EmbedCache, default_folder
    from lowvram_i2v.job import RunOptions
    from lowvram_i2v.pipeline import generate

    cache = None if options.no_cache else EmbedCache(default_folder(), console)
    run_options = RunOptions(cache, options.preview, options.preview_vae)
    path = generate(request, model, profile, device, console, run_options)
    print(console.table(), file=sys.stderr)
    print(path)
    return 0


def _request(options: argparse.Namespace) -> tuple[GenerateRequest, Path, str | None]:
    """The request from --like, if given, and the flags; the model folder; and the profile that --like names."""
    names = [field.name for field in fields(GenerateRequest) if field.name != "output"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    model, profile = options.model, None
    if options.like is not None:
        from lowvram_i2v.video import read_settings

        settings = read_settings(options.like)
        request = GenerateRequest.from_settings(settings, options.output)
        about = settings.get("about")
        about = about if isinstance(about, dict) else {}
        if model is None and isinstance(about.get("model"), str):
            model = model_path(about["model"])
        profile = about["profile"] if isinstance(about.get("profile"), str) else None
        if model is None:
            raise RequestError(f"--model not given, and {options.like} does not name one", "Name the model folder.")
        if "resolution" in given or ("image" in given and (is_demo(model) or _is_bucket(request))):
            given.setdefault("size", None)
        if "stability" in given and given["stability"] != request.stability:
            given.setdefault("flow_shift", None)
        request = replace(request, **given)
    else:
        missing = [f"--{name}" for name in ("image", "prompt") if name not in given]
        if missing:
            raise RequestError(f"{' and '.join(missing)} not given", "Or repeat another video with --like.")
        model = model or shipped()
        known = {"frames": FRAMES, "steps": STEPS} if is_demo(model) else {}
        request = GenerateRequest(output=options.output, **{"seed": secrets.randbits(32), **known, **given})
    if is_demo(model) and request.size is None and "resolution" not in given:
        request = replace(request, size=size_for(request.image))
    return request, model, profile


def _is_bucket(request: GenerateRequest) -> bool:
    """Whether the size is one that --resolution chooses: another picture may then get another."""
    if request.size is None or request.resolution not in RESOLUTIONS:
        return False
    return request.size[::-1] in buckets(RESOLUTIONS[request.resolution])


def _check_preview(options: argparse.Namespace) -> None:
    if options.preview < 0:
        raise RequestError(f"--preview is {options.preview}.", "Give a number of steps, or 0 for no previews.")
    if options.preview_vae is not None and not options.preview:
        raise RequestError("--preview-vae without --preview.", "Say every how many steps: --preview 5.")
    if options.preview_vae is not None and not options.preview_vae.is_file():
        raise RequestError(f"--preview-vae {options.preview_vae} does not exist.")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 960x544")
    return int(width), int(height)


def _add_synth(commands: Any) -> None:
    parser = commands.add_parser("synth", help="write a checkpoint with random weights, for tests and measurements")
    parser.set_defaults(command=_synth)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR")
    add(
        "--size",
        choices=("tiny", "full"),
        default="tiny",
        help="full: 13B, about 26 GB + encoders (default tiny)",
    )
    add("--variant", choices=VARIANTS, default="token_replace")
    add_component(parser)
    add("--seed", type=int, default=0)
    add("--device", default="auto", metavar="NAME", help="where the random numbers are made (default auto)")


def _synth(options: argparse.Namespace) -> int:
    from lowvram_i2v.device import pick_device
    from lowvram_i2v.synth import synth

    components = _components(options)
    device = pick_device(options.device)
    synth(options.folder, options.size, options.variant, components, options.seed, device, Console())
    print(options.folder)
    return 0


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="try the whole path on a small model: no download, no GPU")
    parser.set_defaults(command=_demo)
    parser.add_argument("--folder", type=Path, default=Path("demo_out"), metavar="DIR", help="(default %(default)s)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="your own picture, with a --prompt that fits it")
    parser.add_argument("--prompt", metavar="TEXT", help="what happens in the video")
    parser.add_argument("--device", default="auto", metavar="NAME")


def _demo(options: argparse.Namespace) -> int:
    from lowvram_i2v.demo import demo
    from lowvram_i2v.device import pick_device

    console = Console()
    path = demo(options.folder, options.image, options.prompt, pick_device(options.device), console)
    print(console.table(), file=sys.stderr)
    print(path)
    return 0


def _components(options: argparse.Namespace) -> tuple[str, ...]:
    """The components that --component names, all of them without it."""
    return tuple(COMPONENT_NAMES[name] for name in options.component or COMPONENT_NAMES)
