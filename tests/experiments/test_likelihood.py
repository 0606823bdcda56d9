"""Scores by log-likelihood against a computation of their own; what is learned of a text; perplexity; what is written."""

import json
from copy import deepcopy
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from small_text import causal, pieces, questions
from transformers import BartConfig, BartForCausalLM, BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM

import surgery
from surgery.experiments.comparison_table import Mean
from surgery.experiments.evaluation import Scoring, evaluate, perplexity
from surgery.experiments.likelihood import Likelihood, likelihoods, written
from surgery.experiments.metrics import of_classes, of_numbers, of_outputs, spearman, with_errors
from surgery.experiments.prompts import PROMPT, choices, collated, conversation, learned, marked, rendered
from surgery.experiments.tasks import Choice, Generative, Message
from surgery.experiments.text_tasks import Task
from surgery.experiments.training import Setting, arguments, lesson_of, token_loss, trainer_of
from surgery.experiments.training_cost import step_bytes
from surgery.runtime.calibration import READ
from surgery.runtime.proof import outputs

ASKED = Generative("asked", "choice", tuple(Choice(q["question"], tuple(q["choices"]), q["answer"])
                                            for q in questions(50)))


def by_hand(question: Choice) -> list[float]:
    """The log-likelihood of each choice, one text at a time, without anything of ours."""
    found = []
    for choice in question.choices:
        start = f"Question: {question.question}\nAnswer:"
        ids = pieces()(f"{start} {choice}", return_tensors="pt")["input_ids"][0]
        first = len(pieces()(start)["input_ids"])
        with torch.no_grad():
            chances = torch.log_softmax(causal()(ids[None]).logits[0].double(), -1)
        found.append(sum(float(chances[i - 1, ids[i]]) for i in range(first, len(ids))))
    return found


# ------------------------------------------------------------------------------------------------ log-likelihoods


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_choices_are_as_likely_as_by_hand_in_any_batch(batch: int) -> None:
    encoded = choices(pieces(), ASKED, 512)
    wanted = [value for question in ASKED.items for value in by_hand(question)]
    found = likelihoods(causal(), encoded.items, pieces().pad_token_id, batch)
    np.testing.assert_allclose([each.total for each in found], wanted, rtol=1e-5, atol=1e-5)
    assert encoded.cut == 0 and min(each.tokens for each in found) > 0


@pytest.mark.parametrize(("side", "pad"), [("left", "<pad>"), ("right", "</s>")])
def test_scores_are_those_by_hand_whatever_pads(side: str, pad: str) -> None:
    words = deepcopy(pieces())
    words.padding_side, words.pad_token = side, pad
    totals = [by_hand(question) for question in ASKED.items]
    plain = np.mean([np.argmax(t) == q.answer for t, q in zip(totals, ASKED.items)])
    shared = np.mean([np.argmax([v / len(c) for v, c in zip(t, q.choices)]) == q.answer
                      for t, q in zip(totals, ASKED.items)])
    scores = evaluate(causal(), ASKED, words=words).scores
    assert (scores["accuracy"].value, scores["accuracy_by_length"].value) == (plain, shared) and plain != shared
    assert scores["accuracy"].error == pytest.approx((plain * (1 - plain) / 49) ** 0.5)


def test_what_is_cut_off_a_choice_is_the_start_of_its_question() -> None:
    asked = ASKED.taken([0])
    whole, cut = choices(pieces(), asked, 512), choices(pieces(), asked, 12)
    assert cut.cut == 3 and all(short["labels"] == item["labels"][-12:] for item, short in zip(whole.items, cut.items))
    # without a token before it, the first of a choice has no likelihood: a choice of one token had that of 1, and won
    for length, prompt in ((1, PROMPT), (512, "")):
        with pytest.raises(surgery.SurgeryError, match="cannot be scored whole"):
            choices(pieces(), asked, length, prompt)


# ---------------------------------------------------------------------------------------------- what is learned


def text_of(item: dict, learnt: bool) -> str:
    return pieces().decode([i for i, label in zip(item["input_ids"], item["labels"]) if (label != READ) is learnt])


def test_the_right_choice_is_learned_after_its_question() -> None:
    task = Generative("t", "choice", (Choice("what?", ("the answer", "no"), 0),))
    item, = learned(pieces(), task, 512).items
    assert text_of(item, False) == "Question: what?\nAnswer:" and text_of(item, True) == " the answer"
    item, = learned(pieces(), task, 512, "{question} =").items
    assert text_of(item, False) == "what? ="
    braces = Generative("t", "choice", (Choice("{a} {0}", ("x", "y"), 0),))
    assert text_of(learned(pieces(), braces, 512).items[0], False) == "Question: {a} {0}\nAnswer:"


def test_a_token_over_the_end_of_the_question_is_learned() -> None:
    """`the` is one token, and `th` alone is others."""
    item = marked(pieces(), [("is th", False), ("e answer", True)], True)
    assert item["input_ids"] == pieces()("is the answer")["input_ids"]
    assert text_of(item, False) == "is" and text_of(item, True) == " the answer"


SAID = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r"),
        Message("assistant", "b"))


def test_what_the_assistant_says_is_learned() -> None:
    item, = learned(pieces(), Generative("t", "chat", (SAID,)), 512).items
    assert text_of(item, True) == "a</s>\nb</s>\n"
    assert text_of(item, False) == "<system>s</s>\n<user>q</s>\n<assistant><user>r</s>\n<assistant>"


def test_a_template_that_forgets_leaves_the_last_answer(monkeypatch) -> None:
    forgets = ("{% for m in messages %}<{{ m.role }}>{{ m.content if m.role != 'assistant' or loop.last else '' }}"
               "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    monkeypatch.setattr(pieces(), "chat_template", forgets)
    parts, special = conversation(pieces(), SAID)
    assert [part for part, is_learned in parts if is_learned] == ["b"] and not special
    monkeypatch.setattr(pieces(), "chat_template", "{{ messages | length }}")
    with pytest.raises(surgery.SurgeryError, match="does not say where the assistant's answer begins"):
        conversation(pieces(), SAID)
    monkeypatch.setattr(pieces(), "chat_template", "{{ raise_exception('no system') }}")
    with pytest.raises(surgery.SurgeryError, match="refuses a conversation of .*: no system"):
        conversation(pieces(), SAID)


def test_without_a_template_a_conversation_is_plain_text(monkeypatch) -> None:
    monkeypatch.setattr(pieces(), "chat_template", None)
    parts, special = conversation(pieces(), SAID[1:3])
    assert parts == [("User: q\nAssistant:", False), (" a</s>\n", True)] and special
    whole, asked = (pieces()(rendered(pieces(), SAID[1:n], n == 2))["input_ids"] for n in (3, 2))
    assert asked == whole[:len(asked)]  # asked as it was trained: a space of its own stands in no text that is learned


def test_texts_are_learned_to_the_last_token_in_blocks() -> None:
    task = Generative("t", "language", ("the answer is the question",))
    whole, = learned(pieces(), task, 512).items
    assert whole["input_ids"] == whole["labels"] and whole["input_ids"][-1] == pieces().eos_token_id
    blocks = learned(pieces(), task, 4).items
    assert [i for block in blocks for i in block["input_ids"]] == whole["input_ids"][: sum(
        len(block["input_ids"]) for block in blocks)] and len(blocks[0]["input_ids"]) == 4
    assert collated(blocks, 0)["labels"][:, 0].eq(READ).all()  # nothing predicts it, and no version may count it


def test_what_has_nothing_left_to_learn_is_left_out() -> None:
    encoded = learned(pieces(), Generative("t", "chat", (SAID, SAID[3:])), 20)
    assert encoded.cut == 2 and len(encoded.items) == 1


# --------------------------------------------------------------------------------------------- perplexity, answers


def test_perplexity_is_that_of_all_tokens_together() -> None:
    found = perplexity([Likelihood(-2.0, 1), Likelihood(-3.0, 4)])
    assert found["loss"].value == 1.0 and found["perplexity"].value == pytest.approx(exp(1.0))
    # The residuals are -1 and 1: (2 / 1 · (1 + 1))^½ / 5.
    assert found["loss"].error == pytest.approx(0.4) and found["perplexity"].error == pytest.approx(0.4 * exp(1))
    with pytest.raises(surgery.SurgeryError, match="no finite numbers"):
        perplexity([Likelihood(float("nan"), 1)])
    with pytest.raises(surgery.SurgeryError, match="no token is left"):
        perplexity([Likelihood(0.0, 0)])


def test_the_perplexity_of_texts_by_the_model_s_own_loss() -> None:
    ids = torch.tensor([[*pieces()("the answer is")["input_ids"], 1]])
    with torch.no_grad():
        wanted = float(causal()(ids, labels=ids).loss)
    found = evaluate(causal(), Generative("t", "language", ("the answer is",)), words=pieces())
    assert found.scores["loss"].value == pytest.approx(wanted, rel=1e-5)


def test_what_is_written_is_the_same_in_any_batch() -> None:
    prompts = ["the", "what is the answer of a question", "Answer: of"]
    alone = [written(causal(), pieces(), [prompt], True, 6, 1)[0] for prompt in prompts]
    assert written(causal(), pieces(), prompts, True, 6, 3) == alone and len(set(alone)) == 3
    prefers = deepcopy(causal())
    prefers.generation_config.update(repetition_penalty=9.0, suppress_tokens=pieces()("".join(alone))["input_ids"])
    said = prefers.generation_config.to_dict()
    assert written(prefers, pieces(), prompts, True, 6, 3) == alone  # still the likeliest
    assert prefers.generation_config.to_dict() == said


def test_an_answer_is_right_by_its_last_number(monkeypatch) -> None:
    said = {"one": "I think 3, no, 1,000", "two": "2.0", "three": "none"}
    monkeypatch.setattr("surgery.experiments.evaluation.written",
                        lambda model, words, prompts, *more: [next(v for k, v in said.items() if k in p) for p in prompts])
    items = tuple((Message("user", key), Message("assistant", f"so #### {n}")) for key, n in
                  (("one", "1000"), ("two", "2"), ("three", "3")))
    found = evaluate(causal(), Generative("t", "answer", items), words=pieces())
    assert found.scores["exact_match"].value == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------------------- scores


def test_scores_of_classes_and_numbers() -> None:
    labels, given = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 0, 0])
    # 2 right of class 1, 1 wrongly there, 1 missed: F1 = 2·2 / (2·2 + 1 + 1); Matthews = (2·2 - 1·1) / (3·3).
    assert of_classes(2, given, labels) == pytest.approx({"accuracy": 4 / 6, "f1": 4 / 6, "matthews": 3 / 9})
    assert of_classes(3, np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1]))["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    numbers = of_numbers(np.array([0.0, 0.5, 2.0, 8.0]), np.array([1.0, 2.0, 2.0, 4.0]))
    assert numbers["spearman"] == pytest.approx(4.5 / np.sqrt(4.5 * 5)) and numbers["mse"] == 19.25 / 4
    assert spearman(np.ones(3), np.arange(3.0)) == 0


def test_errors_of_scores() -> None:
    labels = np.arange(400) % 2
    given = np.where(np.arange(400) % 8 < 2, 1 - labels, labels)
    found = with_errors(lambda a, b: of_classes(2, a, b), given, labels)
    assert found["accuracy"] == Mean(0.75, pytest.approx((0.75 * 0.25 / 399) ** 0.5))
    # Balanced on both sides, and so Matthews' correlation is 2 · 0.75 - 1, with twice the error.
    assert found["matthews"] == Mean(pytest.approx(0.5), pytest.approx(2 * (0.75 * 0.25 / 399) ** 0.5, rel=0.2))
    draw = np.random.default_rng(1)
    x = draw.normal(size=1000)
    y = 0.6 * x + 0.8 * draw.normal(size=1000)
    found = with_errors(of_numbers, x, y)
    value = found["pearson"].value  # whose error is (1 - r²) / n^½
    assert found["pearson"].error == pytest.approx((1 - value**2) / 1000**0.5, rel=0.2)
    assert found == with_errors(of_numbers, x, y)
    assert with_errors(of_numbers, np.array([1.0]), np.array([2.0]))["mse"].error is None
    few = {n: of_outputs(Task("few", ("a",) * n, tuple(x[:n])), y[:n, None])["pearson"].error for n in (2, 3, 4, 5)}
    assert few[2] is few[3] is None and all(few[n] > 0 for n in (4, 5))  # of two, each correlation is 1 or -1


def test_one_class_alone_is_scored_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    found = of_outputs(Task("one", ("a",) * 5, (1.0,) * 5, ("no", "yes")), np.array([[0.0, 1.0]] * 5))
    assert {name: mean.value for name, mean in found.items()} == {"accuracy": 1, "f1": 1, "matthews": 0}
    assert not list(recwarn)


def test_a_model_that_cannot_answer_is_told(tmp_path: Path) -> None:
    from small_text import save_model, words

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(3)))
    with pytest.raises(surgery.SurgeryError, match="a BertModel has no outputs for the task `choice`"):
        evaluate(save_model(tmp_path / "bert"), tmp_path / "a.jsonl")
    broken = causal().__class__(causal().config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(surgery.SurgeryError, match="no finite numbers"):
        evaluate(broken, ASKED, words=pieces(), scoring=Scoring(batch=50))
    sees_all = BertLMHeadModel(BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                          intermediate_size=8, initializer_range=1.0))
    with pytest.raises(surgery.SurgeryError, match="this BertLMHeadModel sees the tokens that come after"):
        evaluate(sees_all, ASKED, words=pieces())
    assert words().pad_token == "[PAD]" and sees_all.training


def test_a_score_leaves_each_module_in_the_mode_that_it_was_in() -> None:
    """Batch norms that stay in evaluation while the rest trains would else train from the first score on."""
    model = deepcopy(causal()).train()
    model.lm_head.eval()
    batch = {key: torch.tensor([[5, 6, 7]]) for key in ("input_ids", "labels")}
    evaluate(model, ASKED.limited(2), words=pieces())
    outputs(model)
    step_bytes(model, batch)
    assert model.training and {name for name, m in model.named_modules() if not m.training} == {"lm_head"}


def test_a_loss_is_of_each_token_given_those_before_it_whatever_the_model_has(tmp_path: Path) -> None:
    """BART's decoder has the mean over a batch of tokens given themselves."""
    model = BartForCausalLM(BartConfig(vocab_size=300, d_model=16, decoder_layers=1, decoder_attention_heads=2,
                                       decoder_ffn_dim=8, dropout=0.0)).eval()
    lesson = lesson_of(model, pieces(), ASKED.taken(range(4)), Setting())
    trainer = trainer_of(model, lesson, arguments(str(tmp_path), Setting()))
    found = likelihoods(model, lesson.items, 0, 4)
    count = torch.tensor(sum(each.tokens for each in found))
    for parts in ([lesson.items], [lesson.items[:1], lesson.items[1:]]):  # in one batch and in two
        losses = [trainer.compute_loss(model, lesson.collator(list(part)), num_items_in_batch=count) for part in parts]
        assert float(sum(losses).detach()) == pytest.approx(-sum(each.total for each in found) / int(count), rel=1e-5)


def test_the_balance_of_routers_counts_once_in_a_step(tmp_path: Path) -> None:
    """In however many batches its texts are: two batches of the same are as one of both."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=300, num_hidden_layers=1, num_local_experts=4, **sizes,
                                             output_router_logits=True, router_aux_loss_coef=0.7)).eval()
    lesson = lesson_of(model, pieces(), ASKED.taken(range(2)), Setting())
    trainer = trainer_of(model, lesson, arguments(str(tmp_path), Setting()))
    items, count = list(lesson.items), sum(each.tokens for each in likelihoods(model, lesson.items, 0, 4))
    own = model(**lesson.collator(items)).loss.detach()
    plain = token_loss(model(**lesson.collator(items)), lesson.collator(items)["labels"]).detach()
    assert own - plain > 0.5
    for parts in ([items], [items, items], [2 * items]):
        of_all = torch.tensor(count * sum(map(len, parts)) // 2)
        losses = [trainer.compute_loss(model, lesson.collator(list(part)), num_items_in_batch=of_all) for part in parts]
        torch.testing.assert_close(sum(losses).detach(), own)
