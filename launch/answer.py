"""Answers questions with a trained model, and says how many answers are right.

    python -m launch.answer --workdir=W --questions=test=test.jsonl

The file has rows as those of DPR and FiD (docs/facts.md). Its passages are the neighbours; where it
has none, W's newest database is asked. Answers are decoded greedily. Writes W/evaluation/answers-NAME.json:
each answer, what was retrieved for it, exact match and F1, with 95% intervals over questions.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags
from flax import nnx

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.questions.passages import Asked, open_questions
from data_pipelines.retriever.revisions import open_database
from launch.common import app, configurables, workdirs
from launch.common.flags import AVERAGED, DATA, NUM_NEIGHBOURS, QUESTIONS, RETRIEVAL, question_files
from launch.runs import trained_run
from retro_jax.errors import UserError
from retro_jax.generate.answers import greedy_answers
from retro_jax.generate.generator import Generator, GeneratorOptions
from retro_jax.report.answer_tables import answers_table, figures, scored
from retro_jax.report.result_files import EVALUATION, answers_file
from retro_jax.report.tables import as_text
from retro_jax.storage import files

ANSWER_TOKENS = flags.DEFINE_integer(
    "answer_tokens",
    32,
    "Tokens of an answer at most; the end of a line ends it too.",
    lower_bound=1,
)


def main() -> None:
    """Answers every question, prints the figures and writes them."""
    workdir, data = workdirs.open_to_read(DATA)
    trained_run.refuse_gin_file()
    app.required(QUESTIONS, "NAME=FILE of questions")
    files_asked = question_files()
    bindings = configurables.GIN_BINDINGS.value
    run = trained_run.open_run(workdir / "retro", bindings, averaged=AVERAGED.value)
    trained_run.check_data(run, data)
    k = NUM_NEIGHBOURS.value or run.batches.neighbours
    conditions = {name: k if name == "on" else 0 for name in RETRIEVAL.value or ("on", "off")}
    if not conditions.keys() <= {"on", "off"}:
        raise flags.Error(f"--retrieval={','.join(conditions)}: expected on, off or both")
    if "on" in conditions and not (k and run.model.has_retrieval):
        raise UserError(f"{run.directory} was trained without neighbours: expected --retrieval=off")
    part, shown = run.batches.neighbour_part, conditions.get("on", 0)
    every = open_questions(data, files_asked, most=run.chunks - 1, k=shown, part=part)
    model = nnx.merge(*trained_run.load_model(run))
    for name, asked in every.items():
        result = answers(data, run, model, asked, conditions)
        path = answers_file(workdir / EVALUATION, name)
        path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, files.to_json(result))
        print(as_text(answers_table(name, len(asked.prompts), result["conditions"])))
        print(f"written to {path}\n")


def answers(
    data: pathlib.Path,
    run: trained_run.Run,
    model: Any,
    asked: Asked,
    conditions: Mapping[str, int],
) -> dict[str, Any]:
    """Every answer and its figures, under each condition: its name -> K, 0 for retrieval off."""
    tokenizer = Tokenizer.open(data / "tokenizer")
    rows, results = asked.file.rows(), {}
    special = tokenizer.special_ids - {tokenizer.eos_id}
    for condition, k in conditions.items():
        passages = asked.passages if k else None
        generator = Generator(
            model,
            chunks=run.chunks,
            eos_id=tokenizer.eos_id,
            retrieve=passages,
            forbidden=[*special, *range(tokenizer.vocab_size, run.model.vocab_size)],
            decode=tokenizer.decode,
            options=GeneratorOptions(k or None),
        )
        flat = [prompt.tokens for prompt in asked.prompts]
        texts = greedy_answers(generator, flat, max_tokens=ANSWER_TOKENS.value)
        each = scored(texts, [row["answers"] for row in rows])
        results[condition] = {"neighbours": k} | figures(each)
        for row, answer, prompt in zip(rows, each, asked.prompts, strict=True):
            row[condition] = answer
            if passages is not None:
                answer["passages"] = passages.names(prompt.chunks[-1])
    return {
        "file": {"name": asked.file.name, "sha256": asked.file.sha256},
        "model": run.identity(),
        "database": open_database(data).manifest.hash,
        "answer_tokens": ANSWER_TOKENS.value,
        "conditions": results,
        "questions": rows,
    }


if __name__ == "__main__":
    app.run(main)
