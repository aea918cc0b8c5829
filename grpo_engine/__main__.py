"""The command line: ``python -m grpo_engine train`` and further commands, which ``--help`` lists.

Exit codes: 0 done, 1 the run failed, 2 refused input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError, RunConfig, expanded, preset_names, read_override

if TYPE_CHECKING:
    from .distributed import World
    from .store import Store

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return REFUSED
    from .checkpoint_folder import CheckpointError
    from .store import StoreError

    try:
        code: int = options.action(options)
        return code
    except (ConfigError, StoreError, CheckpointError) as error:
        print(f"Refused: {error}", file=sys.stderr)
        return REFUSED
    except Exception as error:  # the last line of defence: a sentence for the person, the traceback in a file
        print(f"Failed: {_unexpected(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _unexpected(error: Exception) -> str:
    """A sentence on what nobody has foreseen; its traceback is written to a file that it names."""
    with tempfile.NamedTemporaryFile("w", prefix="grpo-error-", suffix=".log", delete=False, encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    reason = f"{type(error).__name__}: {error}".rstrip(".")
    return f"{reason}. The full traceback is in {file.name}; correct what it names and try again, or report it."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_engine", description="Train a prompt rewriter with GRPO, and look after runs."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")

    def command(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--db", default="runs.db", type=_database_path, metavar="PATH",
                         help="database (default: runs.db)")  # fmt: skip
        sub.set_defaults(action=action)
        return sub

    def settings(sub: argparse.ArgumentParser) -> None:
        names = ", ".join(preset_names())
        sub.add_argument("--config", default="tiny", metavar="NAME", help=f"a YAML file or a preset: {names}")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="change a setting, e.g. training.steps=50; objective=dapo (grpo, dr_grpo, rloo, gspo, cispo) sets the "
            "parts of that method",
        )

    sub = command("train", _among_ranks, "start a run and follow it to its report")
    sub.set_defaults(carry=_train)
    settings(sub)
    sub.add_argument("--check", action="store_true", help="only check the settings; start nothing")
    run_help = "a run's id, the beginning of it, its name, or 'last'"
    sub = command("resume", _among_ranks, "continue a stopped, failed or interrupted run from its last checkpoint")
    sub.set_defaults(carry=_resume)
    sub.add_argument("run", help=run_help)
    sub = command("evaluate", _evaluate, "measure a run's policy again, on the test prompts or on other ones")
    sub.add_argument("run", help=run_help)
    sub.add_argument("--checkpoint", default="last", help="last, best or a step")
    sub.add_argument("--prompts", default="", help="another prompt set: a name or a file")
    sub.add_argument("--json", action="store_true", help="print the summary as JSON")
    sub = command("runs", _runs, "list all runs")
    sub.add_argument("--json", action="store_true")
    sub = command("show", _show, "one run: settings, state, report")
    sub.add_argument("run", help=run_help)
    sub.add_argument("--json", action="store_true")
    sub = command("fidelity", _fidelity, "whether a cheap rendering ranks rewrites as a full one does")
    settings(sub)
    sub.add_argument("--run", metavar="RUN", help="this run's settings and policy; it keeps the answer")
    sub.add_argument("--checkpoint", default="last", help="with --run: last, best or a step")
    sub.add_argument("--steps", type=int, metavar="N", help="denoising steps of the full setting")
    sub.add_argument(
        "--full", action="append", default=[], metavar="FIELD=VALUE", help="other models.image settings of it"
    )
    sub.add_argument("--groups", type=int, default=24, metavar="N", help="groups to sample (24)")
    sub.add_argument("--json", action="store_true", help="print the answer as JSON")
    sub = command("export", _export, "write a run's trained policy to a folder, or the whole run to a .zip file")
    sub.add_argument("run", help=run_help)
    sub.add_argument("--to", type=Path, metavar="PATH", help="a folder; for a bundle a file. Needed without --push")
    sub.add_argument("--format", choices=("peft", "merged", "pth", "bundle"), default="peft")
    sub.add_argument("--checkpoint", default="last", help="last, best or a step; for a bundle also none")
    sub.add_argument("--force", action="store_true", help="replace an earlier export there")
    sub.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub, for all to see")
    sub.add_argument("--private", action="store_true", help="with --push: only for those who may see the owner's own")
    bundle = sub.add_argument_group("with --format bundle")
    bundle.add_argument("--images", choices=("all", "evaluations", "none"), help="pictures to take along (all)")
    bundle.add_argument("--every", type=int, metavar="N", help="of the steps' pictures, those of every n-th step (1)")
    bundle.add_argument("--webp", action="store_true", help="make the pictures WebP: lossy, a tenth of the size")
    sub = command("import", _import, "add a run from a bundle, to look at it and try its policy")
    sub.add_argument("file", type=Path, help="what 'export --format bundle' has written")
    sub.add_argument("--again", action="store_true", help="also if the database has the run already")
    sub = command("doctor", _doctor, "what this machine has, and what is missing")
    settings(sub)
    sub.add_argument("--json", action="store_true")
    return parser


def _database_path(text: str) -> str:
    """``--db`` with ``~`` filled in, which a shell leaves alone after a ``=``."""
    try:
        return str(expanded(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _note(line: str) -> None:
    """For the person, beside the answer that a program may read."""
    print(line, file=sys.stderr)


def _which(text: str) -> Any:
    if text.isdigit():
        return int(text)
    if text not in ("last", "best"):
        raise ConfigError(f"--checkpoint is {text!r}; use last, best or a step number.")
    return text


def _among_ranks(options: argparse.Namespace) -> int:
    """Train or resume: with several ranks, the first one is this command and the others go along."""
    from .distributed import ALONE, join, launched

    carry: Callable[[argparse.Namespace, World], int] = options.carry
    if not launched():
        return carry(options, ALONE)
    world = join()
    try:
        if world.first:
            return carry(options, world)
        from .companion import accompany

        return accompany(world)
    finally:
        world.leave()


def _train(options: argparse.Namespace, world: World) -> int:
    config = RunConfig.load(options.config, options.set)
    from .cli_progress import follow
    from .plan import Plan
    from .store import Store

    plan = Plan(config, world)
    for note in plan.prompts.report:
        print(f"note: {note}")
    for download in plan.downloads:
        print(f"note: {download.sentence}")
    if options.check:
        print(f"The settings are fine: {plan.placement.describe()}; {len(plan.train)} training prompts.")
        return DONE
    with Store(options.db) as store:
        run_id = store.create_run(config, prompt_set=plan.prompts.name, prompt_fingerprint=plan.prompts.fingerprint())
        print(f"run {run_id}")
        return follow(store, run_id, world)


def _resume(options: argparse.Namespace, world: World) -> int:
    from .cli_progress import follow

    with _database(options) as store:
        run = store.require_idle(store.resolve(options.run).id)
        if run.state == "finished":
            raise ConfigError(f"Run {run.id} is finished; there is nothing to resume. 'evaluate' measures it again.")
        print(f"run {run.id}")
        return follow(store, run.id, world)


def _evaluate(options: argparse.Namespace) -> int:
    from .cli_progress import print_report
    from .session import evaluate_run

    with _database(options) as store:
        run = store.resolve(options.run)
        summary = evaluate_run(store, run.id, _which(options.checkpoint), options.prompts, told=_note)
        if options.json:
            print(json.dumps(summary, indent=2))
        else:
            print_report(summary)
    return DONE


def _fidelity(options: argparse.Namespace) -> int:
    from .checkpoint import find_checkpoint
    from .fidelity import measure_fidelity
    from .memory import changed_settings

    if options.groups < 2:
        raise ConfigError(f"--groups is {options.groups}, but an interval needs at least 2.")
    wanted = [*([f"steps={options.steps}"] if options.steps is not None else []), *options.full]
    changes = {}
    for name, value in map(read_override, wanted):
        if "." in name.removeprefix("models.image."):
            raise ConfigError(f"--full takes settings of models.image, such as steps=28, not {name!r}.")
        changes[f"models.image.{name.removeprefix('models.image.')}"] = value

    def told(phase: str, done: int, total: int) -> None:
        print(f"{phase} {done}/{total}", file=sys.stderr)

    if options.run is None:
        config = RunConfig.load(options.config, options.set)
        found = measure_fidelity(config, changed_settings(config, changes), options.groups, told=told)
    else:
        if options.set:
            raise ConfigError("--set is for --config: a run's own settings are compared; leave out --set or --run.")
        with _database(options) as store:
            row = store.resolve(options.run)
            config = RunConfig.parse(row.config)
            checkpoint, note = find_checkpoint(store.run_dir(row.id), _which(options.checkpoint))
            if note:
                _note(note)
            full = changed_settings(config, changes)
            found = measure_fidelity(config, full, options.groups, checkpoint=checkpoint, told=told)
            store.add_event(row.id, "fidelity", found.sentence, checkpoint=checkpoint.name, **found.as_data())
    print(json.dumps(found.as_data(), indent=2) if options.json else found.sentence)
    return DONE


def _runs(options: argparse.Namespace) -> int:
    from .cli_progress import print_runs

    with _database(options) as store:
        rows = store.runs()
        if options.json:
            print(json.dumps([_as_json(row) for row in rows], indent=2))
        else:
            print_runs(rows)
    return DONE


def _show(options: argparse.Namespace) -> int:
    from .bundle import origin
    from .cli_progress import print_run

    with _database(options) as store:
        row = store.resolve(options.run)
        if options.json:
            print(json.dumps(_as_json(row), indent=2))
        else:
            print_run(store, row)
            if elsewhere := origin(store, row.id):
                print(elsewhere)
    return DONE


def _export(options: argparse.Namespace) -> int:
    if options.private and not options.push:
        raise ConfigError("--private is for --push, which names the repository on the hub.")
    if options.format == "bundle":
        return _export_bundle(options)
    if options.images is not None or options.every is not None or options.webp:
        raise ConfigError(f"--images, --every and --webp are for --format bundle, not {options.format}.")
    if options.push:
        from .push import check_repository

        check_repository(options.push)
    if options.to:
        target = _write_policy(options, options.to)
        print(f"Written to {target}")
        return _push(options, target) if options.push else DONE
    if not options.push:
        raise ConfigError("Where to? --to names a folder, --push a repository on the hub.")
    with tempfile.TemporaryDirectory(prefix="grpo-export-") as folder:
        return _push(options, _write_policy(options, Path(folder) / "export"))


def _write_policy(options: argparse.Namespace, to: Path) -> Path:
    """Export the policy that the options name; returns the folder."""
    from .export import export

    with _database(options) as store:
        row = store.resolve(options.run)
        policy = None
        if options.format == "merged":
            from .loading import load_policy
            from .placement import resolve

            config = RunConfig.parse(row.config)
            policy = load_policy(config, resolve(config.placement).policy)
        return export(
            store.run_dir(row.id), to, format=options.format, policy=policy, summary=row.summary,
            which=_which(options.checkpoint), force=options.force,
        )  # fmt: skip


def _push(options: argparse.Namespace, folder: Path) -> int:
    from .push import PushFailed, push

    try:
        where = push(folder, options.push, private=options.private, message=f"Prompt rewriter ({options.format})")
    except PushFailed as error:
        kept = f" The export is in {folder}." if options.to else ""
        print(f"Failed: {error}{kept}", file=sys.stderr)
        return FAILED
    print(f"Pushed to {where}")
    return DONE


def _export_bundle(options: argparse.Namespace) -> int:
    from .bundle import write_bundle

    if options.push:
        raise ConfigError("--push is for a policy, not for a bundle; use --format peft, merged or pth.")
    if not options.to:
        raise ConfigError("--to must name the bundle's file.")
    with _database(options) as store:
        target = write_bundle(
            store, store.resolve(options.run).id, options.to,
            images=options.images or "all", every=1 if options.every is None else options.every,
            reencode=options.webp, force=options.force,
            checkpoint=None if options.checkpoint == "none" else _which(options.checkpoint),
        )  # fmt: skip
    print(f"Written to {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return DONE


def _import(options: argparse.Namespace) -> int:
    from .bundle import inspect_bundle, origin, read_bundle
    from .store import Store

    inspect_bundle(options.file)  # before a database is made for it
    with Store(options.db) as store:
        run_id = read_bundle(store, options.file, again=options.again)
        print(f"run {run_id}: {origin(store, run_id)}")
    return DONE


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine, print_findings

    findings = examine(options.db, options.config, options.set)
    if options.json:
        print(json.dumps(findings, indent=2))
    else:
        print_findings(findings)
    return DONE if not findings["problems"] else FAILED


@contextmanager
def _database(options: argparse.Namespace) -> Iterator[Store]:
    """The database of a command that needs one to be there; runs whose process died are marked first."""
    from .store import Store

    if not Path(options.db).exists():
        raise ConfigError(f"There is no database {options.db}; 'train' makes one, or name another with --db.")
    with Store(options.db) as store:
        store.interrupt_stale()
        yield store


def _as_json(row: Any) -> dict[str, Any]:
    data = {key: value for key, value in vars(row).items() if key not in ("config_json", "process_token")}
    return data | {"config": row.config, "tags": list(row.tags)}


if __name__ == "__main__":
    sys.exit(main())
