"""The command line: verbs over plan and run. Imports nothing heavy at start-up."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pipeline
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    ExitCode,
    GateError,
    PipelineError,
    Problem,
    StageError,
    error_to_json,
)

_Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; every user error becomes a message and an exit code."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(typed)
        with _interrupted_by(signal.SIGTERM, signal.SIGHUP):
            return int(options.handler(options))
    except PipelineError as error:
        return _report(error, as_json="--json" in typed)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `trtpipe plan | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except OSError as error:
        from pipeline.disk import disk_error

        known = disk_error(error)
        if known is None:
            raise
        return _report(known, as_json="--json" in typed)


def _report(error: PipelineError, *, as_json: bool) -> int:
    from pipeline.console import print_error

    print_error(error)
    if as_json:
        _print_json(error_to_json(error))
    return int(error.exit_code)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other mistake, as text or as JSON."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(self.prog, message, fix=f"{self.prog} --help"))


@contextlib.contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """Let these end a command as Ctrl-C does: children ended, nothing half-written left."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Under nohup SIGHUP is ignored, and stays so.
    heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trtpipe", description=pipeline.__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    plan = _add_build_verb(
        verbs, "plan", _plan, "say what would happen, and every problem, without doing it"
    )
    plan.add_argument(
        "--picture",
        metavar="FILE",
        type=_path,
        help="also draw the memory of every rank, as .png or .svg",
    )
    _add_build_verb(
        verbs, "run", _run, "make what is missing and publish engine and model repository"
    )
    _add_build_verb(verbs, "explain", _explain, "say field by field why each stage would run")
    _add_build_verb(verbs, "data", _data, "look at the calibration data before it is used")
    for name, handler, text in (
        ("show", _show, "what a published engine or any checkpoint or engine directory holds"),
        ("verify", _verify, "check every published file and show the quality report"),
        ("serve", _serve, "start Triton on a published model repository"),
    ):
        _add_verb(verbs, name, handler, text, "CONFIG_OR_DIR")
    _add_client(verbs)
    return parser


def _add_verb(
    verbs: Any, name: str, handler: _Handler, text: str, subject: str
) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    verb.add_argument("subject", metavar=subject, type=_path)
    verb.add_argument("--json", action="store_true", help="one JSON document on standard output")
    verb.set_defaults(handler=handler)
    return verb


def _path(text: str) -> Path:
    """A path of the command line, where `~` is the shell's to expand."""
    from pipeline.links import possible_path

    try:
        return possible_path(text, home=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_build_verb(verbs: Any, name: str, handler: _Handler, text: str) -> argparse.ArgumentParser:
    verb = _add_verb(verbs, name, handler, text, "CONFIG")
    verb.add_argument(
        "--weights",
        metavar="DIR|synthetic",
        help="other weights for this build: a local directory, or seeded random ones",
    )
    return verb


def _add_client(verbs: Any) -> None:
    text = "ask a running server"
    verb = _add_verb(verbs, "client", _client, text, "CONFIG_OR_DIR")
    verb.add_argument("prompt", help="text; - reads standard input")
    verb.add_argument("--protocol", choices=("http", "grpc"), default="http")
    verb.add_argument("--stream", action="store_true", help="print text as it is generated")
    verb.add_argument("--max-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, help="0 (greedy) unless given")
    verb.add_argument("--top-k", type=int)
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--seed", type=int)
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT")


def _load(options: argparse.Namespace) -> Any:
    from pipeline.config import load_config

    loaded = load_config(options.subject)
    if options.weights:
        from pipeline.weights import override_weights

        loaded = override_weights(loaded, options.weights)
    return loaded


def _workspace() -> Any:
    from pipeline.workspace import Workspace

    return Workspace(Path.cwd())


def _plan(options: argparse.Namespace) -> int:
    from pipeline.console import print_error, stdout_console
    from pipeline.plan import make_plan
    from pipeline.render import plan_json, print_plan, short_title

    workspace = _workspace()
    if options.picture is not None:
        from pipeline.forecast.picture import check_picture_path

        check_picture_path(options.picture)
    plan = make_plan(_load(options), workspace.store, workspace.digests())
    if options.picture is not None and plan.forecast is not None:
        from pipeline.forecast.picture import write_picture

        write_picture(options.picture, short_title(plan), plan.forecast)
    if options.json:
        _print_json(plan_json(plan))
    else:
        print_plan(plan, _reasons(plan, workspace), stdout_console())
    try:
        plan.raise_problems()
    except PipelineError as error:  # already part of the JSON document
        print_error(error)
        return int(error.exit_code)
    return int(ExitCode.DONE)


def _run(options: argparse.Namespace) -> int:
    from pipeline.console import ConsoleView
    from pipeline.run import run

    view = ConsoleView()
    try:
        result = run(_load(options), _workspace(), view)
    finally:
        view.close()
    if options.json:
        _print_json(
            {
                "engine_dir": str(result.engine_dir),
                "repository_dir": result.repository_dir and str(result.repository_dir),
                "executed": list(result.executed),
                "published": result.published,
                "facts": {name: artifact.facts for name, artifact in result.artifacts.items()},
            }
        )
        return int(ExitCode.DONE)
    state = "published" if result.published else "nothing to do"
    visible = [result.engine_dir, *filter(None, [result.repository_dir])]
    print(f"{state}: {' and '.join(map(_relative, visible))}")
    return int(ExitCode.DONE)


def _explain(options: argparse.Namespace) -> int:
    from pipeline.plan import make_plan

    workspace = _workspace()
    reasons = _reasons(make_plan(_load(options), workspace.store, workspace.digests()), workspace)
    if options.json:
        _print_json(reasons)
        return int(ExitCode.DONE)
    for stage, lines in reasons.items():
        print(f"{stage}: {'up to date' if not lines else 'would run'}")
        for line in lines:
            print(f"    {line}")
    return int(ExitCode.DONE)


def _data(options: argparse.Namespace) -> int:
    from pipeline.data_page import look_at_data, page_text

    page = look_at_data(_load(options), _workspace())
    if options.json:
        _print_json(page.to_json())
    else:
        print(page_text(page))
    return int(ExitCode.DONE)


def _reasons(plan: Any, workspace: Any) -> dict[str, list[str]]:
    """Why each stage would run, compared with what is published under the plan's name, if anything."""
    from pipeline.explain import explain

    path = workspace.engines_dir / plan.loaded.config.name / "manifest.json"
    try:
        published = json.loads(path.read_text("utf-8"))["actions"]
    except (OSError, ValueError, KeyError, TypeError):
        published = {}
    return explain(plan, workspace.store, published)


def _published(subject: Path, parent: str) -> Any:
    """Something published (pipeline.manifest.Published), from its config or its directory.

    Raises:
        StageError: it has not been published.
        GateError: its manifest is not one.
    """
    from pipeline.config import load_config
    from pipeline.manifest import read_published

    if subject.is_dir():
        return read_published(subject)
    return read_published(getattr(_workspace(), parent) / load_config(subject).config.name)


def _served(subject: Path) -> Any:
    """A published model repository, from its config or its directory.

    Raises:
        StageError: it has not been published, or is of a build that makes none.
    """
    from pipeline.config import load_config
    from pipeline.manifest import no_server

    if not subject.is_dir():
        config = load_config(subject).config
        if config.mapping.world_size > 1 or config.build.backend in ("none", "tensorrt_llm"):
            raise StageError(replace(no_server(config), where=str(subject)))
    return _published(subject, "repositories_dir")


def _show(options: argparse.Namespace) -> int:
    from pipeline.links import circle_problem
    from pipeline.show import contents_json, contents_text, describe, is_published

    directory, published = options.subject, None
    circle = circle_problem(directory)
    if circle is not None:
        raise CheckpointError(circle)
    if not directory.is_dir() or is_published(directory):
        published = _published(options.subject, "engines_dir")
        directory = published.directory
    has_tensors = published is None or (directory / "config.json").exists()
    contents = describe(directory) if has_tensors else None
    if options.json:
        shown = contents_json(contents) if contents else {}
        _print_json(shown if published is None else {**published.document, "contents": shown})
        return int(ExitCode.DONE)
    if published is not None:
        from pipeline.console import stdout_console
        from pipeline.render import print_manifest

        print_manifest(directory, published.manifest, stdout_console())
    if contents is not None:
        print(contents_text(contents))
    return int(ExitCode.DONE)


def _verify(options: argparse.Namespace) -> int:
    from pipeline.integrity import check_published, here_json, identity_lines, offered_here
    from pipeline.nvidia_host import nvidia_host

    published = _published(options.subject, "engines_dir")
    problems = check_published(published)
    if problems:
        raise GateError(problems)
    manifest = published.manifest
    here = offered_here(manifest.identity, nvidia_host())
    has_report = "report.json" in manifest.files
    if options.json:
        path = published.directory / "report.json"
        report = json.loads(path.read_text("utf-8")) if has_report else None
        shown = {"identity": manifest.identity.model_dump(mode="json"), "here": here_json(here)}
        _print_json({"files": len(manifest.files), "report": report, **shown})
        return int(ExitCode.DONE)
    print(f"{len(manifest.files)} files as published (sha256)")
    for line in (*identity_lines(manifest.identity), *(f"here: {line}" for line in here.lines)):
        print(line)
    if not has_report:
        print(f"no quality report here: it is published with the engine, engines/{manifest.name}")
        return int(ExitCode.DONE)
    for name, value in manifest.facts.get("verify", {}).items():
        print(f"{name}: {value}")
    return int(ExitCode.DONE)


def _serve(options: argparse.Namespace) -> int:
    from pipeline.serving.command import serve

    published = _served(options.subject)
    manifest = published.manifest
    config = _serve_config(options.subject, manifest)
    serve(published.directory, manifest.model_name, config, as_json=options.json)
    return int(ExitCode.DONE)


def _serve_config(subject: Path, manifest: Any) -> Any:
    """Ports and host: today's YAML if one was given, else what was published."""
    from pipeline.config import load_config

    if subject.is_dir():
        return manifest.config.serve
    return load_config(subject).config.serve


def _client(options: argparse.Namespace) -> int:
    from pipeline.serving.client import AskOptions, decode_text
    from pipeline.serving.command import ask_and_print

    manifest = _served(options.subject).manifest
    ask_and_print(
        sys.stdin.buffer.read() if options.prompt == "-" else os.fsencode(options.prompt),
        manifest.model_name,
        _serve_config(options.subject, manifest),
        protocol=options.protocol,
        options=AskOptions(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop_words=tuple(decode_text("--stop", os.fsencode(word)) for word in options.stop),
        ),
        stream=options.stream,
        as_json=options.json,
    )
    return int(ExitCode.DONE)


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


if __name__ == "__main__":
    sys.exit(main())
