"""`sdtrain evaluate`: FID against CLIP score over guidance scales. Its options are the fields of `Protocol`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from sdtrain.cli.output import print_json, print_table, prints_to_stderr
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from sdtrain.evaluation.protocol import Protocol
    from sdtrain.evaluation.sweep import Sweep

# Our own code is imported inside the commands, so that help does not wait for torch.

_SHORT = {"num_prompts": "--num", "num_steps": "--steps"}
_FORMER = {"networks": ("--network",)}
_OWN = {
    "models": Annotated[list[Path], typer.Argument(help="Runs, checkpoints, diffusers folders or CompVis files.")],
    "output": Annotated[Path | None, typer.Option(help="By default `evaluation` in a run's folder.")],
    "x": Annotated[str | None, typer.Option(help="The plot's axis across: a column. By default agreement.")],
    "y": Annotated[str | None, typer.Option(help="The plot's axis up: a column, as fd_dinov2. By default FID.")],
    "training_data": Annotated[
        list[str] | None,
        typer.Option(help="A dataset on which the models were trained, besides those that runs record; repeatable."),
    ],
    "contamination": Annotated[
        bool, typer.Option(help="Look for the prompts and reference images in the training data.")
    ],
    "questions": Annotated[
        Path | None, typer.Option(help="GenEval 2's geneval2_data.jsonl, for prompt following; needs --judge.")
    ],
    "judge": Annotated[
        Path | None, typer.Option(help="YAML with url, model, … of the server that answers the questions.")
    ],
    "processes": Annotated[int | None, typer.Option(help="Processes; by default one a GPU.", min=1)],
    "as_json": Annotated[bool, typer.Option("--json", help="Print the results as JSON; progress goes to stderr.")],
}


_OWN_DEFAULTS = {
    **dict.fromkeys(("output", "x", "y", "training_data", "questions", "judge", "processes")),
    "contamination": True,
    "as_json": False,
}


class FromProtocol(TyperCommand):
    """Reads its options from `Protocol` only on use, so no other command waits for them."""

    @cached_property
    def _command(self) -> TyperCommand:
        app = typer.Typer(add_completion=False)
        app.command()(_with_options())
        command = typer.main.get_command(app)
        assert isinstance(command, TyperCommand)  # noqa: S101
        return command

    def get_params(self, ctx: Any) -> Any:
        """The arguments and options."""
        return self._command.get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        return self._command.invoke(ctx)


def evaluate() -> None:
    """Draw images over guidance scales and measure them; started again, it goes on where it was."""


def _evaluate(
    models: list[Path],
    output: Path | None,
    x: str | None,
    y: str | None,
    training_data: list[str] | None,
    contamination: bool,
    questions: Path | None,
    judge: Path | None,
    processes: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    from filters.contamination.training_data import search_training_data
    from sdtrain.evaluation.judging.scores import AXES
    from sdtrain.evaluation.protocol import Protocol
    from sdtrain.evaluation.results import protocol_lines, table_of, table_of_skills
    from sdtrain.evaluation.sweep import plan
    from sdtrain.evaluation.workers import run_sweep
    from sdtrain.sampling.batch import all_devices
    from sdtrain.settings import parse_settings

    given = settings | {"scales": parse_scales(settings["scales"])}
    num_processes = len(all_devices(processes))
    further = AXES if questions else {}
    sweep = plan(parse_settings(Protocol, given, "command line"), models, output, x, y, further)
    if questions or judge:
        sweep = _with_judge(sweep, questions, judge)
    if contamination:
        sweep = search_training_data(sweep, training_data or ())
    with prints_to_stderr(as_json):
        results = run_sweep(sweep, num_processes, lambda line: print(line, flush=True))
    if as_json:
        print_json(results.model_dump(mode="json"))
        return
    print(*protocol_lines(results), sep="\n")
    print_table(table_of(results))
    print_table(table_of_skills(results))
    print(*(path for path in (sweep.directory.results, sweep.directory.curve) if path.exists()), sep="\n")


def _with_judge(sweep: Sweep, questions: Path | None, judge: Path | None) -> Sweep:
    from sdtrain.endpoint.config import EndpointConfig
    from sdtrain.evaluation.judging.following import with_prompt_following
    from sdtrain.settings import load_settings

    if questions is None or judge is None:
        raise UserError("--questions and --judge go together: a file of questions, and the server that answers them.")
    return with_prompt_following(sweep, questions, load_settings(EndpointConfig, judge))


def _with_options() -> Callable[..., None]:
    """`_evaluate` with typer's view of its arguments and an option per field of `Protocol`."""
    from sdtrain.evaluation.protocol import Protocol

    def command(**given: Any) -> None:
        _evaluate(**given)

    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in _OWN.items()]
    own[1:] = [parameter.replace(default=_OWN_DEFAULTS[parameter.name]) for parameter in own[1:]]
    parameters = [own[0], *(_option(name, field) for name, field in Protocol.model_fields.items()), *own[1:]]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = evaluate.__doc__
    return command


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, default = field.annotation, field.default
    least = next((limit.ge for limit in field.metadata if hasattr(limit, "ge")), None)
    if isinstance(default, tuple):
        kind, default = str, ",".join(f"{part:g}" if isinstance(part, float) else part for part in default)
    elif isinstance(field.json_schema_extra, dict):
        kind = Literal[tuple(field.json_schema_extra["enum"])]  # type: ignore[arg-type, assignment]
    flags = _flag(name), *_FORMER.get(name, ())
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.is_required() else default,
        annotation=Annotated[kind, typer.Option(*flags, help=field.description, min=least)],
    )


def command_of(model: Path | str, protocol: Protocol) -> str:
    """The command line of an evaluation: the settings that are not the defaults."""
    words = ["sdtrain evaluate", str(model)]
    for name, field in type(protocol).model_fields.items():
        value = getattr(protocol, name)
        if value != field.default:
            words += [_flag(name), *([] if value is True else [_text_of(value)])]
    return " ".join(words)


def _text_of(value: object) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


def _flag(name: str) -> str:
    return _SHORT.get(name, f"--{name.replace('_', '-')}")


def parse_scales(text: str) -> tuple[float, ...]:
    """Guidance scales from "1.5,2,3"; UserError unless they are numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--scales '{text}': write numbers with commas between them, as in 1.5,2,3.") from error
