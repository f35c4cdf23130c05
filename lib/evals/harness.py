"""EleutherAI's lm-evaluation-harness on our checkpoints: its tasks, our likelihoods and decoding.

`python -m lib.evals.harness --run NAME --tasks hellaswag,arc_easy`, or in code of your own
`register()` and then `lm_eval.simple_evaluate(model="rawchat", model_args="run=NAME,stage=sft")`.
"""

import functools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lib.data.speech import said
from lib.evals import likelihood, questions, records
from lib.files import UserError, choose, first_line, local_path, write_json
from lib.generate import Sampling
from lib.params import count_params
from lib.runs import STAGES, load_model

# A chat is handed through lm_eval as text. Ours begins with this, and JSON follows: special tokens
# in a task's text stay plain text.
CHAT = "\ue000chat\ue000"
# new tokens where a task does not say how many
MAX_TOKENS = 256
# names that lm_eval's tasks give the arguments of generation
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")
# what a file of results holds for each task, and for all of them.
BY_TASK = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
WHOLE = ("config", "date")
# what a measurement is compared by: another value is another measurement.
SETTINGS = ("limit", "num_fewshot", "bootstrap_iters", "gen_kwargs", "random_seed", "batch_size")


def _import():
    """lm_eval, or a sentence that tells how to get it."""
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            "this needs lm-evaluation-harness: pip install lm_eval (it needs no torch)"
        ) from None
    return lm_eval


# ---- its requests as ours


def context_ids(tokenizer, context: str) -> tuple[list[int], str]:
    """(ids, text still to be encoded behind them) of a context of lm_eval.

    The context is plain text, or a chat from `apply_chat_template`.
    """
    if not context.startswith(CHAT):
        return [tokenizer.bos], context
    # what follows the chat is the beginning of an answer that the task wants
    messages, end = json.JSONDecoder().raw_decode(context, len(CHAT))
    ids = tokenizer.render_for_completion(messages)
    last = messages[-1]
    begun = last["content"] if last["role"] == "assistant" else ""
    return ids, begun + context[end:]


def pair_ids(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context, bos first, and of its continuation.

    Encoded as `questions.continuation_ids` does.
    """
    ids, rest = context_ids(tokenizer, context)
    before, after = questions.continuation_ids(tokenizer, rest, continuation)
    return [*ids, *before[1:]], after


def sampling(arguments: dict, stop: tuple[int, ...], seed: int, room: int) -> Sampling:
    """Our `Sampling` for lm_eval's generation arguments, at most `room` new tokens.

    UserError for an argument that we don't know.
    """
    # taken out one by one, so that what is left is unknown
    given = dict(arguments)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    limits = [given.pop(name) for name in LIMITS if name in given]
    max_tokens = int(limits[0]) if limits else MAX_TOKENS
    filters = {name: given.pop(name) for name in FILTERS if name in given}
    temperature = float(given.pop("temperature", 0.0))
    if not given.pop("do_sample", temperature > 0):
        temperature = 0.0

    if given:
        raise UserError(
            f"generation argument {', '.join(given)} is not known here: leave it out of the task's "
            "generation_kwargs"
        )
    return Sampling(
        min(max_tokens, room),
        temperature,
        seed=seed,
        stop=stop,
        stop_strings=tuple(text for text in until if text),
        **filters,
    )


# ---- our model as one of theirs


class Prompt(NamedTuple):
    """A request to write. cut: its beginning was left out, because the context is too short."""

    ids: list[int]
    sampling: Sampling
    cut: bool


class Checkpoint:
    """A checkpoint of ours with the methods that lm_eval asks of a model.

    Contexts too long for the model lose their beginning, with a warning that counts them;
    generation is given at most half of the context. The calculator answers a model that calls it,
    as in our own evaluation, and what it called is not among what it said.
    """

    def __init__(
        self,
        run: str,
        stage: str = "",
        ckpt: str = "",
        runs_dir: str = "runs",
        batch_size: int = 32,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if device:
            raise UserError(
                f"device={device}: JAX chooses the device, so leave this out (or set JAX_PLATFORMS)"
            )
        if not str(batch_size).isdigit() or not int(batch_size):
            raise UserError(f"batch_size={batch_size}: a number of rows is needed")
        self.model = load_model(local_path(runs_dir) / str(run), ckpt, stage)
        self.seed = int(seed)
        m = self.model
        self.answers = questions.model_answers(m.params, m.config, m.tokenizer, int(batch_size))
        self.stop = questions.stop_ids(m.tokenizer)

    def loglikelihood(self, requests):
        """(log-probability, whether greedy decoding would write it) of each continuation."""
        # continuations of one context are one request of ours
        m = self.model
        by_context = {}
        for n, request in enumerate(requests):
            before, after = pair_ids(m.tokenizer, *request.args)
            by_context.setdefault(tuple(before), []).append((n, after))
        asked = []
        for before, members in by_context.items():
            asked.append((list(before), [after for _, after in members]))

        # back into the order of the requests
        answers = likelihood.score(m.params, m.config, m.tokenizer, asked)
        scores = {}
        for members, by_continuation in zip(by_context.values(), answers):
            for (n, _), score in zip(members, by_continuation):
                scores[n] = score
        cut = sum(score.cut > 0 for score in scores.values())
        self._warn_cut(cut, len(scores))
        return [(scores[n].logprob, scores[n].greedy) for n in range(len(scores))]

    def loglikelihood_rolling(self, requests):
        """The log-probability of each whole text."""
        m = self.model
        texts = [m.tokenizer.encode(request.args[0]) for request in requests]
        logprobs = likelihood.rolling(m.params, m.config, m.tokenizer, texts)
        return [float(row.sum(dtype="float64")) for row in logprobs]

    def generate_until(self, requests):
        """What the model says after each context."""
        prompts = [self._prompt(n, request) for n, request in enumerate(requests)]
        self._warn_cut(sum(prompt.cut for prompt in prompts), len(prompts))
        written = {}
        if prompts:
            ids = [prompt.ids for prompt in prompts]
            samplings = [prompt.sampling for prompt in prompts]
            # a prompt comes twice, begun without ids and done with them
            for i, new in self.answers.texts(ids, samplings):
                written[i] = new
        return [said(self.model.tokenizer, written[i]) for i in range(len(prompts))]

    def _prompt(self, n: int, request) -> Prompt:
        """Request number n with its sampling, cut to what there is room for."""
        context, arguments = request.args
        m = self.model
        # each request draws from a seed of its own
        options = sampling(arguments, self.stop, self.seed + n, m.config.sequence_len // 2)
        ids, rest = context_ids(m.tokenizer, context)
        ids = [*ids, *m.tokenizer.encode(rest)]

        # the oldest tokens go, but for bos
        most = m.config.sequence_len - options.max_tokens
        cut = len(ids) > most
        if cut:
            ids = [ids[0], *ids[len(ids) - most + 1 :]]
        return Prompt(ids, options, cut)

    def _warn_cut(self, cut: int, total: int):
        if cut:
            warnings.warn(
                f"{cut} of {total} contexts were longer than the model's "
                f"{self.model.config.sequence_len} tokens: their beginning was left out",
                stacklevel=3,
            )

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return CHAT + json.dumps(chat_history)

    @property
    def tokenizer_name(self):
        return f"rawchat-{self.model.tokenizer.fingerprint[:16]}"

    def get_model_info(self):
        m = self.model
        return dict(
            checkpoint=str(m.path),
            stage=m.stage,
            step=m.meta["step"],
            model_num_parameters=count_params(m.config)["total"],
        )


@functools.cache
def register():
    """Make "rawchat" a model of lm_eval and return its class; arguments as `Checkpoint` has."""
    _import()
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    # theirs is a base class, which can only be named once lm_eval is there
    rawchat = type("Rawchat", (Checkpoint, LM), {})
    return register_model("rawchat")(rawchat)


# ---- measuring and keeping


def evaluate(
    run,
    tasks: list[str],
    *,
    stage: str = "",
    ckpt: str = "",
    include_path=None,
    defaults: bool = True,
    **options,
) -> dict:
    """lm_eval's results of a run folder's model on `tasks`.

    tasks: names that lm_eval knows or finds in the YAML files of include_path. defaults: whether
    lm_eval's own tasks may be named. options: others of lm_eval.simple_evaluate, such as limit,
    num_fewshot, apply_chat_template, batch_size. UserError for unknown tasks and for data that
    cannot be had.
    """
    lm_eval: Any = _import()
    run = Path(run)
    include_path = str(local_path(include_path)) if include_path else None
    if include_path and not Path(include_path).is_dir():
        raise UserError(
            f"include_path {include_path} is no folder: name one that holds task YAML files"
        )
    from lm_eval.tasks import TaskManager

    # names are checked before a model is loaded
    folder = str(include_path) if include_path else None
    manager = TaskManager(include_path=folder, include_defaults=defaults)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"lm_eval knows no task {', '.join(unknown)}: see `lm_eval ls tasks`, or give the "
            "folder of its YAML as include_path"
        )

    # the measurement
    batch_size = options.pop("batch_size", None) or 32
    rawchat: Any = register()
    model = rawchat(run.name, stage, ckpt, str(run.parent), batch_size)
    try:
        results = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, **options
        )
    except (OSError, ConnectionError) as e:
        raise UserError(
            f"lm_eval could not get a task's data ({first_line(e)}): check the network, or the "
            "paths in its YAML"
        ) from e
    # lm_eval leaves this out of its own record of settings
    results["config"]["chat_template"] = bool(options.get("apply_chat_template"))
    return results


def write(run, results: dict) -> Path:
    """Merge what `evaluate` gave, without its single answers, into the run; the path.

    The file evals/lm_eval_STAGE.json has an entry for each task that was measured of a checkpoint,
    with its date and settings under "measured". Tasks that are measured again are replaced, and
    those of another checkpoint go.
    """
    from lm_eval.utils import handle_non_serializable

    kept = {key: results[key] for key in (*BY_TASK, *WHOLE) if key in results}
    kept = json.loads(json.dumps(kept, default=handle_non_serializable))

    # when and how each task was measured: its neighbours may be of another day
    config = kept["config"]
    settings = {key: config[key] for key in (*SETTINGS, "chat_template") if key in config}
    names = [*kept.get("results", {}), *kept.get("groups", {})]
    kept["measured"] = {name: dict(time=records.now(), **settings) for name in names}

    # merged with what the file holds already
    stage = choose("stage", config["stage"], tuple(STAGES))
    path = Path(run, "evals", f"lm_eval_{stage}.json")
    write_json(path, _merged(records.read(path), kept))
    return path


def _merged(old: dict, new: dict) -> dict:
    """Results of one checkpoint, task by task; nothing of another one's."""
    old_config = old.get("config", {})
    new_config = new["config"]
    if any(old_config.get(key) != new_config.get(key) for key in records.IDENTITY):
        old = {}

    # tasks beside each other, everything else as it is now
    merged = old | new
    for part in (*BY_TASK, "measured"):
        if part in old or part in new:
            merged[part] = old.get(part, {}) | new.get(part, {})
    return merged


def scores_text(results: dict) -> str:
    """A line for each metric of each task: its value and error.

    lm_eval's own table would fork this process, which runs threads of JAX and may then stand still.
    """
    lines = []
    for task, metrics in results["results"].items():
        for name, figure in metrics.items():
            # "acc,none" and its error "acc_stderr,none", which may be "N/A"
            metric, _, by = name.partition(",")
            if not isinstance(figure, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{by}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            lines.append(f"{task:24} {metric:20} {figure:.4f}{spread}")
    return "\n".join(lines)


# ---- the command


@dataclass
class HarnessSettings:
    """Evaluate a run with lm-evaluation-harness; results go to its evals/lm_eval_STAGE.json."""

    run: str
    """name of the run"""
    tasks: str
    """lm_eval's names, separated by commas"""
    stage: str = ""
    """base, mid, sft or rl; empty takes the furthest that the run has"""
    ckpt: str = ""
    """empty for the stage's newest checkpoint, best, or a path or address"""
    include_path: str = ""
    """folder with task YAML files of your own"""
    limit: int = 0
    """first so many items of each task (0: all)"""
    num_fewshot: int = -1
    """examples in the prompt (-1: what the task says)"""
    chat_template: bool = False
    """put questions as a chat"""
    batch_size: int = 32
    """rows written at once"""
    runs_dir: str = "runs"
    """folder that holds the runs"""


def main(settings: HarnessSettings) -> None:
    """Measure, keep the results and print them."""
    _import()
    folder = local_path(settings.runs_dir) / settings.run
    tasks = settings.tasks.replace(",", " ").split()
    results = evaluate(
        folder,
        tasks,
        stage=settings.stage,
        ckpt=settings.ckpt,
        include_path=settings.include_path or None,
        limit=settings.limit or None,
        num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
        batch_size=settings.batch_size,
        apply_chat_template=settings.chat_template,
        bootstrap_iters=1000,
    )
    # kept before anything is shown
    path = write(folder, results)
    print(scores_text(results))
    print(f"results: {path}")


if __name__ == "__main__":
    import os

    import tyro

    from lib.interrupts import started
    from lib.notebook import setup

    setup()
    started()
    # its bootstrap would fork this process, which runs threads of JAX
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    main(tyro.cli(HarnessSettings))
