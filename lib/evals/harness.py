"""EleutherAI's lm-evaluation-harness on our checkpoints: its tasks and metrics, our likelihoods and our decoding.

`python -m lib.evals.harness --run NAME --tasks hellaswag,arc_easy`, or in code of your own `register()` and then
`lm_eval.simple_evaluate(model="rawchat", model_args="run=NAME,stage=sft", ...)`.
"""

import functools
import json
import warnings
from pathlib import Path

from lib.evals import likelihood
from lib.evals import questions as chat
from lib.files import UserError, first_line, write_json
from lib.generate import Sampling
from lib.params import count_params
from lib.runs import load_model

# A chat is handed through lm_eval as text; ours begins with this, and JSON follows: special tokens in a task's text stay plain text.
CHAT = "\ue000chat\ue000"
MAX_TOKENS = 256  # new tokens where a task does not say how many


def _import():
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            "this needs lm-evaluation-harness: pip install lm_eval (it needs no torch)"
        ) from None
    return lm_eval


def context_ids(tokenizer, context: str) -> tuple[list[int], str]:
    """(ids, text still to be encoded behind them) of a context of lm_eval, plain text or a chat from `apply_chat_template`."""
    if not context.startswith(CHAT):
        return [tokenizer.bos], context
    messages, end = json.JSONDecoder().raw_decode(context, len(CHAT))
    ids = tokenizer.render_for_completion(messages)
    return ids, (messages[-1]["content"] if messages[-1]["role"] == "assistant" else "") + context[
        end:
    ]


def pair_ids(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context, bos first, and of its continuation, encoded as `chat.continuation_ids` does."""
    ids, rest = context_ids(tokenizer, context)
    before, after = chat.continuation_ids(tokenizer, rest, continuation)
    return [*ids, *before[1:]], after


def sampling(arguments: dict, stop: tuple[int, ...], seed: int, room: int) -> Sampling:
    """Our `Sampling` for lm_eval's generation arguments, at most `room` new tokens. UserError for one that we don't know."""
    given = dict(arguments)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    limits = [
        given.pop(name)
        for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        if name in given
    ]
    temperature = float(given.pop("temperature", 0.0))
    if not given.pop("do_sample", temperature > 0):
        temperature = 0.0
    known = {
        name: given.pop(name)
        for name in ("top_k", "top_p", "min_p", "repetition_penalty")
        if name in given
    }
    if given:
        raise UserError(
            f"generation argument {', '.join(given)} is not known here: leave it out of the task's generation_kwargs"
        )
    return Sampling(
        min(int(limits[0]) if limits else MAX_TOKENS, room),
        temperature,
        seed=seed,
        stop=stop,
        stop_strings=tuple(text for text in until if text),
        **known,
    )


@functools.cache
def register():
    """Make "rawchat" a model of lm_eval and return its class, whose arguments are those of `Rawchat.__init__`."""
    _import()
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    @register_model("rawchat")
    class Rawchat(LM):
        """A checkpoint of ours as a model of lm_eval.

        Contexts too long for the model lose their beginning, with a warning that counts them; generation is given at most half of the
        context. The calculator answers a model that calls it, as in our own evaluation.
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
            self.model = load_model(Path(runs_dir) / str(run), ckpt, stage)
            self.seed, m = int(seed), self.model
            self.answers = chat.model_answers(m.params, m.config, m.tokenizer, int(batch_size))
            self.stop = (
                m.tokenizer.special["<|assistant_end|>"],
                m.tokenizer.special["<|user_start|>"],
                m.tokenizer.bos,
            )

        def _warn_cut(self, cut: int, total: int):
            if cut:
                warnings.warn(
                    f"{cut} of {total} contexts were longer than the model's {self.model.config.sequence_len} tokens: "
                    "their beginning was left out",
                    stacklevel=3,
                )

        def loglikelihood(self, requests):
            m, groups = self.model, {}
            for n, request in enumerate(requests):
                before, after = pair_ids(m.tokenizer, *request.args)
                groups.setdefault(tuple(before), []).append((n, after))
            asked = [
                (list(before), [after for _, after in members])
                for before, members in groups.items()
            ]
            found = [None] * len(requests)
            for members, scores in zip(
                groups.values(), likelihood.score(m.params, m.config, m.tokenizer, asked)
            ):
                for (n, _), score in zip(members, scores):
                    found[n] = score
            self._warn_cut(sum(score.cut > 0 for score in found), len(found))
            return [(score.logprob, score.greedy) for score in found]

        def loglikelihood_rolling(self, requests):
            m = self.model
            texts = [m.tokenizer.encode(request.args[0]) for request in requests]
            return [
                float(row.sum(dtype="float64"))
                for row in likelihood.rolling(m.params, m.config, m.tokenizer, texts)
            ]

        def generate_until(self, requests):
            m, room, cut = self.model, self.model.config.sequence_len // 2, 0
            prompts, samplings = [], []
            for n, request in enumerate(requests):
                context, arguments = request.args
                samplings.append(sampling(arguments, self.stop, self.seed + n, room))
                ids, rest = context_ids(m.tokenizer, context)
                ids = [*ids, *m.tokenizer.encode(rest)]
                most = m.config.sequence_len - samplings[-1].max_tokens
                cut += len(ids) > most
                prompts.append(ids if len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]])
            self._warn_cut(cut, len(prompts))
            found = dict.fromkeys(range(len(prompts)))
            if prompts:
                found |= {
                    i: ids for i, ids in self.answers.texts(prompts, samplings) if ids is not None
                }
            return [m.tokenizer.decode(ids) for ids in found.values()]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return CHAT + json.dumps(chat_history)

        @property
        def tokenizer_name(self):
            return f"rawchat-{self.model.tokenizer.fingerprint[:16]}"

        def get_model_info(self):
            m = self.model
            return dict(
                checkpoint=m.path,
                stage=m.stage,
                step=m.meta["step"],
                model_num_parameters=count_params(m.config)["total"],
            )

    return Rawchat


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
    """lm_eval's results of a run folder's model on `tasks`, names that lm_eval knows or finds in the YAML files of include_path.

    defaults: whether lm_eval's own tasks may be named. options: others of lm_eval.simple_evaluate, such as limit, num_fewshot,
    apply_chat_template, batch_size. UserError for unknown tasks and for data that cannot be had.
    """
    lm_eval, run = _import(), Path(run)
    if include_path and not Path(include_path).is_dir():
        raise UserError(
            f"include_path {include_path} is no folder: name one that holds task YAML files"
        )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(include_path) if include_path else None, include_defaults=defaults
    )
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise UserError(
            f"lm_eval knows no task {', '.join(unknown)}: see `lm_eval ls tasks`, or give the folder of its YAML "
            "as include_path"
        )
    model = register()(
        run.name, stage, ckpt, str(run.parent), options.pop("batch_size", None) or 32
    )
    try:
        return lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, **options
        )
    except (OSError, ConnectionError) as e:
        raise UserError(
            f"lm_eval could not get a task's data ({first_line(e)}): check the network, or the paths in its YAML"
        ) from e


def write(run, results: dict) -> Path:
    """Keep what `evaluate` gave, without its single answers, in the run's evals/lm_eval_STAGE.json; the path."""
    from lm_eval.utils import handle_non_serializable

    path = Path(run) / "evals" / f"lm_eval_{results['config']['stage']}.json"
    kept = {
        key: results[key]
        for key in ("results", "groups", "versions", "n-shot", "n-samples", "config", "date")
        if key in results
    }
    write_json(path, json.loads(json.dumps(kept, default=handle_non_serializable)))
    return path


if __name__ == "__main__":
    import os

    import tyro

    from lib.notebook import setup

    def main(
        run: str,
        tasks: str,
        stage: str = "",
        ckpt: str = "",
        include_path: str = "",
        limit: int = 0,
        num_fewshot: int = -1,
        chat_template: bool = False,
        batch_size: int = 32,
        runs_dir: str = "runs",
    ):
        """Evaluate runs/NAME with lm-evaluation-harness; results go to its evals/lm_eval_STAGE.json.

        Args:
            run: name of the run
            tasks: lm_eval's names, separated by commas
            stage: base, mid, sft or rl; empty takes the furthest that the run has
            ckpt: empty for the stage's newest checkpoint, best, or a path or address
            include_path: folder with task YAML files of your own
            limit: first so many items of each task (0: all)
            num_fewshot: examples in the prompt (-1: what the task says)
            chat_template: put questions as a chat
            batch_size: rows written at once
            runs_dir: folder that holds the runs
        """
        _import()
        from lm_eval.utils import make_table

        folder = Path(runs_dir) / run
        results = evaluate(
            folder,
            [t for t in tasks.split(",") if t],
            stage=stage,
            ckpt=ckpt,
            include_path=include_path or None,
            limit=limit or None,
            num_fewshot=None if num_fewshot < 0 else num_fewshot,
            batch_size=batch_size,
            apply_chat_template=chat_template,
            bootstrap_iters=1000,
        )
        print(make_table(results))
        print(f"results: {write(folder, results)}")

    setup()
    # its bootstrap would fork this process, which runs threads of JAX
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    tyro.cli(main)
