"""``lrag-ray view | export | push``: the report in a browser, as one file to give away, and on the Hub."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrag_ray.cli.options import AsJson, named_runs
from lrag_ray.cli.output import console, print_json, quantity, tells_errors, write
from lrag_ray.errors import UsageError
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from lrag_ray.report.collect import ReportData
    from lrag_ray.store.records import RolloutId

Runs = Annotated[
    list[str], typer.Argument(metavar="[LABEL=]RUN", help="Addresses of run directories (run.uri), with labels.")
]
Suite = Annotated[str | None, typer.Option("--suite", help="Which scores [default: those that compare best].")]
Mode = Annotated[str | None, typer.Option("--mode", help="Which scores of vbench_long, compat or direct.")]
Strips = Annotated[
    int | None,
    typer.Option("--strips", metavar="N", min=0, help="Prompts per backbone with strips, or as in a report."),
]

PromptText = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Videos of prompts that contain this, in any case.")
]
Methods = Annotated[list[str] | None, typer.Option("--method", help="Videos of this method; may be repeated.")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=0, help="Videos of the first N prompts alone.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("view")(view)
    app.command("export")(export)
    app.command("push")(push)


@tells_errors
def view(
    runs: Runs,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port of this machine [default: any].", show_default=False)
    ] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    suite: Suite = None,
    mode: Mode = None,
    strips: Annotated[int, typer.Option("--strips", metavar="N", min=0, help="Prompts per backbone with strips.")] = 0,
) -> None:
    """Show the report of one run, or of several as one, in a browser until Ctrl-C.

    The page is made from what the runs hold now and served to this machine alone (127.0.0.1); nothing is written to
    the runs. On another machine: ssh -L 8000:127.0.0.1:8000 HOST, and --port 8000 there.

    \b
    Examples:
      lrag-ray view runs/demo
      lrag-ray view s3://bucket/table2 --no-browser --port 8000
    """
    from lrag_ray.report.view import ReportServer
    from lrag_ray.store.scratch import scratch_folder

    data = _collected(runs, suite, mode)
    with scratch_folder() as folder:
        try:
            server = ReportServer(data, folder, port=port, strips=strips)
        except OSError as error:
            raise UsageError(f"--port {port}: {error.strerror}. Fix: leave it out, or give another one") from error
        with server:
            write(f"{server.address}\nCtrl-C ends it")
            if browser:
                webbrowser.open(server.address)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                # This is how it is meant to end.
                return


@tells_errors
def export(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[LABEL=]RUN... FILE.zip", help="Addresses of runs, and the file to write.")
    ],
    prompt: PromptText = None,
    method: Methods = None,
    limit: Limit = None,
    suite: Suite = None,
    mode: Mode = None,
    strips: Strips = None,
    as_json: AsJson = False,
) -> None:
    """Write the report with its tables and videos into one archive, to be unpacked and opened anywhere.

    The tables always cover the whole run; the options choose the videos.

    \b
    Examples:
      lrag-ray export runs/demo demo.zip
      lrag-ray export runs/table2 table2.zip --limit 8 --method rag --method infinity_rope
    """
    from lrag_ray.report.export import export_report

    *runs, file = arguments
    if not runs or not file.endswith(".zip"):
        raise UsageError("give the runs and then the file to write, which ends in .zip")
    data = _collected(runs, suite, mode)
    made = export_report(data, file, _chosen(data, prompt, method, limit), strips)
    if as_json:
        print_json(made)
    else:
        out: Any = console()
        for line in made.missing:
            out.print(f"Left out: {line}")
        out.print(
            f"{made.file}: {counted(made.videos, 'video')}, {quantity(made.size_bytes, 'B')}; unpack it and "
            f"open report.html"
        )
    raise typer.Exit(1 if made.missing else 0)


@tells_errors
def push(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[LABEL=]RUN... hub://OWNER/NAME", help="Addresses of runs, and where to.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Create the repository for everybody, or write to one that is public.")
    ] = False,
    prompt: PromptText = None,
    method: Methods = None,
    limit: Limit = None,
    suite: Suite = None,
    mode: Mode = None,
    strips: Strips = None,
    as_json: AsJson = False,
) -> None:
    """Write the report with its tables and videos to a dataset repository on the Hugging Face Hub.

    The repository is created as private, and a public one is refused, unless --public is given. The token is that of
    the environment (HF_TOKEN), HF_ENDPOINT names a mirror. The options choose the videos, as for export.

    \b
    Examples:
      lrag-ray push runs/demo hub://me/demo --limit 4
      lrag-ray push runs/table2 hub://me/table2 --method rag --public
    """
    from lrag_ray.report.push import push_report
    from lrag_ray.store.hub import SCHEME, hub_place

    *runs, address = arguments
    if not runs or not address.startswith(SCHEME):
        raise UsageError("give the runs and then where to, hub://OWNER/NAME")
    place = hub_place(address)
    data = _collected(runs, suite, mode)
    made = push_report(data, place, _chosen(data, prompt, method, limit), strips, public=public)
    if as_json:
        print_json(made)
    else:
        out: Any = console()
        for line in made.missing:
            out.print(f"Left out: {line}")
        who = "for everybody" if made.public else "private"
        out.print(
            f"{made.page} ({who}): {counted(made.videos, 'video')}, {quantity(made.size_bytes, 'B')}", soft_wrap=True
        )
    raise typer.Exit(1 if made.missing else 0)


def _collected(runs: list[str], suite: str | None, mode: str | None) -> ReportData:
    """What the report of these runs, with or without labels, shows."""
    from lrag_ray.report import collect
    from lrag_ray.store.rollouts import RolloutRun

    uris, labels = named_runs(runs)
    return collect([RolloutRun(uri) for uri in uris], suite, mode, must_have=True, labels=labels)


def _chosen(
    data: ReportData, prompt: str | None, methods: list[str] | None, limit: int | None
) -> Callable[[RolloutId], bool]:
    """Which rollouts the options choose. UsageError for a method that the runs do not have."""
    unknown = [name for name in methods or () if name not in data.identity.methods]
    if unknown:
        raise UsageError(f"--method {unknown[0]}: the runs have {', '.join(data.identity.methods)}")
    texts = {name: found.text.lower() for name, found in data.identity.prompts.items()}
    fitting = [name for name, text in texts.items() if prompt is None or prompt.lower() in text]
    chosen = set(fitting[:limit])
    return lambda rollout: rollout.prompt_id in chosen and (not methods or rollout.method in methods)
