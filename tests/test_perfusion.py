"""Perfusion: gated rank-1 edits against NumPy, the metric, key locking, the gate, several concepts, sizes."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_helpers import fails
from flax import nnx
from PIL import Image
from tiny import SIDE, pictures

from datencoder_jax import api, compile_ahead, sampling, tuning
from datencoder_jax.bookkeeping import PERSONALIZE
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.cli import build_parser, main
from datencoder_jax.commands import personalize as commands
from datencoder_jax.composition import compose
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS, perfusion, text_metric
from datencoder_jax.models.attention import Attention
from datencoder_jax.models.edits import apply, follows_class, ready
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.plan.shapes import stable_diffusion
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import Concept, Gate, Gated, LearningRates, LowRank, Variables

CONFIG = TuningConfig(draws=2, views=4)
RATES = LearningRates(1e-2, 3e-2)
STEPS, WIDTH = 3, 12


@pytest.fixture(scope="module")
def tuned(pipeline):
    return {lock: personalize(pipeline, options={"lock": lock}).concept for lock in ("local", "global", "off")}


@pytest.fixture(scope="module")
def beginning(pipeline):
    return personalize(pipeline, steps=0).concept


def personalize(pipeline, **changes):
    options = {"method": "perfusion", "steps": STEPS, "word": "robot", "config": CONFIG, "learning_rates": RATES}
    return api.personalize(pipeline, pictures(2), **options | {"quiet": True} | changes)


def draw(pipeline, concept, prompts=("a photo of a S*",), **options):
    options = {"num": 1, "sampling_steps": 2, "quiet": True} | options
    return api.generate(pipeline, list(prompts), concept=concept, **options).images.astype(int)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def state_of(pipeline, vector, prompt="a photo of a S*"):
    """The text tower's state where the prompt holds the vector."""
    ids = jnp.asarray(pipeline.tokenizer.encode([prompt], {"S*": 1}))
    place = int(np.argmax(np.asarray(ids[0]) >= pipeline.tokenizer.vocab_size))
    return np.asarray(pipeline.base.text(ids, jnp.asarray(vector)).last_hidden[0, place], np.float64)


# --- the edit


def some_gate(seed, count):
    """A metric and a gate of `count` concepts, in float64."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((WIDTH, WIDTH))
    metric = factor @ factor.T / WIDTH + np.eye(WIDTH)
    direction = rng.standard_normal((count, WIDTH))
    bias, temperature = rng.uniform(0.3, 0.8, count), rng.uniform(0.1, 0.3, count)
    return metric, Gate(direction, direction @ metric, bias, temperature)


def edited(gate, x, weight, output):
    """`x W` with the edit."""
    gate, x, weight, output = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (gate, x, weight, output))
    made = ready({"p": Gated(output)}, {"p.weight": weight}, gate=gate)["p"]
    return np.asarray(apply(made, x, x @ weight))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def some_input(seed, count):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, 5, WIDTH)), rng.standard_normal((WIDTH, 6)), rng.standard_normal((count, 6))


def test_one_concept_is_the_papers_equation():
    metric, gate = some_gate(0, 1)
    x, weight, output = some_input(1, 1)
    i = gate.direction[0]
    energy, expected = i @ metric @ i, np.zeros((2, 5, 6))
    for b in range(2):
        for p in range(5):
            sim = x[b, p] @ metric @ i
            g = sigmoid((sim / energy - gate.bias[0]) / gate.temperature[0])
            expected[b, p] = (x[b, p] - i * sim / energy) @ weight + g * output[0]
    np.testing.assert_allclose(edited(gate, x, weight, output), expected, rtol=1e-4, atol=1e-4)


def test_several_concepts_are_taken_out_along_an_orthonormal_basis_of_all():
    """As the paper's appendix has it: Gram-Schmidt in the metric, by its Cholesky factor."""
    metric, gate = some_gate(2, 3)
    x, weight, output = some_input(3, 3)
    upper = np.linalg.cholesky(metric).T
    basis = np.linalg.solve(upper, np.linalg.qr(upper @ gate.direction.T)[0]).T
    np.testing.assert_allclose(basis @ metric @ basis.T, np.eye(3), atol=1e-9)
    kept = x - np.einsum("bpi,ij,kj,kl->bpl", x, metric, basis, basis)
    energy = np.einsum("ki,ij,kj->k", gate.direction, metric, gate.direction)
    open_ = sigmoid((x @ metric @ gate.direction.T / energy - gate.bias) / gate.temperature)
    expected = kept @ weight + open_ @ output
    np.testing.assert_allclose(edited(gate, x, weight, output), expected, rtol=1e-4, atol=1e-4)


def test_two_concepts_of_one_direction_are_taken_out_once():
    gate = some_gate(4, 1)[1]
    x, weight, output = some_input(5, 1)
    twice = jax.tree.map(lambda a: np.concatenate([a, a * (1 + 1e-6)]), gate)
    both = edited(twice, x, weight, np.concatenate([output, 0 * output]))
    np.testing.assert_allclose(both, edited(gate, x, weight, output), rtol=1e-3, atol=1e-3)


def test_a_closed_gate_leaves_the_model_without_the_direction():
    metric, gate = some_gate(6, 1)
    x, weight, output = some_input(7, 1)
    i = gate.direction
    without = weight - metric @ i.T @ (i @ weight) / (i @ metric @ i.T)
    closed = edited(gate._replace(bias=np.array([1e6])), x, weight, output)
    np.testing.assert_allclose(closed, x @ without, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(closed, edited(gate._replace(bias=np.array([1e6])), x, weight, 0 * output))


def test_nothing_is_learned_of_a_gate():
    _, gate = some_gate(8, 1)
    gate, (x, weight, output) = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (gate, some_input(9, 1)))

    def size(gate, output):
        made = ready({"p": Gated(output)}, {"p.weight": weight}, gate=gate)["p"]
        return jnp.square(apply(made, x, x @ weight)).sum()

    of_gate, of_output = jax.grad(size, argnums=(0, 1))(gate, output)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_gate)) and np.abs(of_output).min() > 0


# --- the metric


def test_the_metric_is_the_inverse_of_the_covariance_of_text_states(pipeline):
    ids = text_metric.prompt_ids(pipeline)
    states = float64(jax.jit(lambda base, ids: base.condition(ids).context)(pipeline.base.only("text"), ids))
    states = states.reshape(-1, WIDTH)
    moment = states.T @ states / len(states)
    np.testing.assert_allclose(text_metric.covariance(pipeline, quiet=True), moment, rtol=1e-5, atol=1e-6)
    expected = np.linalg.inv(moment + 1e-3 * np.trace(moment) / WIDTH * np.eye(WIDTH))
    found = text_metric.text_metric(pipeline, quiet=True)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.isfinite(text_metric.inverse(np.ones((4, 4)))).all()  # what has no inverse


def test_the_prompts_are_templates_with_words_of_the_vocabulary(pipeline):
    ids, known = text_metric.prompt_ids(pipeline), np.asarray(pipeline.base.words)
    assert ids.shape == (text_metric.PROMPTS, pipeline.tokenizer.length) and ids.max() < pipeline.tokenizer.vocab_size
    np.testing.assert_array_equal(ids, text_metric.prompt_ids(pipeline))
    plain = pipeline.tokenizer.encode(text_metric.TEMPLATES, {"@1": 1, "@2": 1}) >= pipeline.tokenizer.vocab_size
    assert (plain.sum(axis=1) == 2).all()
    assert known[ids[: len(plain)][plain]].all() and len(set(ids[:, 1:].ravel())) > 200


def test_the_metric_is_computed_once(pipeline, monkeypatch):
    first = text_metric.text_metric(pipeline, quiet=True)
    monkeypatch.setattr(text_metric, "covariance", None)
    assert text_metric.text_metric(pipeline, quiet=True) is first
    with pytest.raises(TypeError):
        # As a LoRA of the text tower leaves it, which changes no fingerprint.
        other = replace(pipeline.base, text=pipeline.base.text.with_params(dict(pipeline.base.text.params)))
        text_metric.text_metric(replace(pipeline, base=other), quiet=True)


# --- start and tuning


def test_the_start_is_the_class_word(pipeline, beginning):
    base, word = pipeline.base, pipeline.tokenizer.word_id("robot")
    np.testing.assert_array_equal(beginning.embeddings, np.asarray(base.table)[[word]])
    state, metric = state_of(pipeline, beginning.embeddings), float64(text_metric.text_metric(pipeline, quiet=True))
    np.testing.assert_allclose(beginning.gate.direction[0], state, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(beginning.gate.dual[0], state @ metric, rtol=1e-3, atol=1e-3)
    paths = [path for path in attention_shapes(base.unet) if path.endswith((".attn2.to_k", ".attn2.to_v"))]
    assert list(beginning.offsets) == paths
    for path, edit in beginning.offsets.items():
        expected = state @ float64(base.unet.params[f"{path}.weight"])
        np.testing.assert_allclose(edit.output[0], expected, rtol=1e-4, atol=1e-5)
    assert beginning.nearest_word == "robot"
    other = personalize(pipeline, steps=0, word="red robot").concept  # the class word comes last, and is the concept
    same(other.offsets, beginning.offsets)


@pytest.fixture(scope="module")
def stepwise(pipeline, beginning):
    """The states of tuning step by step, from where `personalize` starts, with its draws."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), PERSONALIZE), 3)
    images = api.prepare(pipeline, pictures(2))
    gate = jax.tree.map(jnp.asarray, beginning.gate)._replace(bias=jnp.array([0.75]), temperature=jnp.array([0.1]))
    variables = Variables(*jax.tree.map(jnp.asarray, (beginning.embeddings, beginning.offsets)), gate)
    problem = tuning.Problem(
        pipeline.base.only("unet", "text", "text_2"),
        tuning.encode_views_program(pipeline.base.only("vae"), images, keys[1], config=CONFIG, quiet=True),
        jnp.asarray(pipeline.tokenizer.encode(["a photo of a S*"], {"S*": 1})),
        None,
        jnp.float32(1),
        jax.tree.map(jnp.float32, perfusion.rates_of(variables, RATES)),
        keys[2],
        metric=jnp.asarray(text_metric.text_metric(pipeline, quiet=True)),
    )
    step, states = jax.jit(tuning.tune_step, static_argnames="config"), [tuning.start(variables)]
    for _ in range(STEPS):
        states.append(step(problem, states[-1], config=CONFIG)[0])
    return [state.variables for state in states]


def test_the_fused_loop_equals_single_steps(tuned, stepwise):
    found = Variables(tuned["local"].embeddings, tuned["local"].offsets, tuned["local"].gate)
    end = perfusion.finish(stepwise[-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, end)


def test_the_gate_is_the_moving_average_of_the_concepts_state(pipeline, stepwise):
    metric, gates = float64(text_metric.text_metric(pipeline, quiet=True)), [v.gate for v in stepwise]
    direction = float64(gates[0].direction)
    for variables in stepwise[1:]:
        direction = 0.99 * direction + 0.01 * state_of(pipeline, variables.embeddings)
        np.testing.assert_allclose(variables.gate.direction, direction, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(variables.gate.dual, direction @ metric, rtol=1e-3, atol=1e-3)
    assert not np.array_equal(gates[0].direction, gates[-1].direction)
    same([gate[2:] for gate in gates], [gates[0][2:]] * len(gates))  # beta and tau


def test_locked_keys_stay_and_values_learn(tuned, beginning):
    for lock, concept in tuned.items():
        assert np.abs(concept.embeddings - beginning.embeddings).min() > 0
        for path, edit in concept.offsets.items():
            moved = np.abs(edit.output - beginning.offsets[path].output)
            if path.endswith("to_k") and lock == "local":
                assert not moved.any()
            else:
                assert moved.min() > 0, (lock, path)
    keys = {lock: [path for path in concept.offsets if path.endswith("to_k")] for lock, concept in tuned.items()}
    assert keys["local"] == keys["off"] and not keys["global"]
    values = [path for path in tuned["local"].offsets if path.endswith("to_v")]
    same(*([tuned[lock].offsets[path] for path in values] for lock in ("local", "global")))


def test_a_concept_has_the_gate_for_drawing(tuned):
    for lock, concept in tuned.items():
        assert concept.gate.bias == np.float32(0.5 if lock == "global" else 0.7)
        assert concept.gate.temperature == np.float32(0.15)


def test_what_is_trained_is_counted(pipeline):
    shapes = attention_shapes(pipeline.base.unet).items()
    keys, values = (sum(out for path, (_, out) in shapes if path.endswith(f"attn2.to_{kind}")) for kind in "kv")
    for lock, expected in (("local", WIDTH + values), ("off", WIDTH + keys + values)):
        assert personalize(pipeline, options={"lock": lock}).report["trained"] == expected


def test_options_reach_tuning(pipeline, tuned):
    other = personalize(pipeline, options={"beta": "0.5", "tau": 0.2}).concept
    paths = [path for path in other.offsets if path.endswith("to_v")]
    assert not np.array_equal(other.offsets[paths[0]].output, tuned["local"].offsets[paths[0]].output)
    assert {name: other.metadata[f"option_{name}"] for name in ("beta", "tau")} == {"beta": "0.5", "tau": "0.2"}


# --- files and pictures


def test_a_file_holds_every_bit_and_draws_the_same(pipeline, tuned, tmp_path):
    for lock, concept in tuned.items():
        save_concept(tmp_path / lock, concept)
        loaded = load_concept(tmp_path / lock, pipeline.fingerprint, attention_shapes(pipeline.base.unet), width=WIDTH)
        for part in ("embeddings", "offsets", "gate"):
            same(getattr(loaded, part), getattr(concept, part))
        if lock == "local":
            np.testing.assert_array_equal(draw(pipeline, loaded), draw(pipeline, concept))


def test_the_gate_moves_without_retraining(pipeline, tuned):
    concept = tuned["local"]
    drawn = [draw(pipeline, concept, gate=gate) for gate in ((0.3, 0.15), (0.7, 0.15), (1.1, 0.15))]
    np.testing.assert_array_equal(drawn[1], draw(pipeline, concept))
    assert all(np.abs(drawn[a] - drawn[b]).max() > 0 for a, b in ((0, 1), (1, 2), (0, 2)))


def test_a_closed_gate_gives_nothing_of_the_concept(pipeline, tuned):
    concept = tuned["local"]
    nothing = {path: Gated(0 * edit.output) for path, edit in concept.offsets.items()}
    closed = draw(pipeline, concept, gate=(1e6, 0.1))
    np.testing.assert_array_equal(closed, draw(pipeline, replace(concept, offsets=nothing)))
    assert np.abs(closed - draw(pipeline, concept)).max() > 0


def test_two_concepts_in_one_picture(pipeline, tuned):
    concept = tuned["local"]
    other = replace(personalize(pipeline, word="dog", steps=0).concept, token="T*")
    joined = compose([concept, other]).variables
    path = next(iter(concept.offsets))
    x = np.random.default_rng(0).standard_normal((1, 4, WIDTH))
    weight = pipeline.base.unet.params[f"{path}.weight"]
    gate, w = float64((joined.gate, weight))
    i, d = gate.direction, gate.dual
    kept = x - x @ d.T @ np.linalg.inv(i @ d.T) @ i
    open_ = sigmoid((x @ d.T / np.diagonal(i @ d.T) - gate.bias) / gate.temperature)
    expected = kept @ w + open_ @ float64(joined.offsets[path].output)
    # The two directions of the tiny text tower are close, so float32 leaves less of its digits.
    np.testing.assert_allclose(edited(joined.gate, x, w, joined.offsets[path].output), expected, rtol=0.02, atol=0.02)
    prompts = ["a photo of a S* and a T*"]
    both = draw(pipeline, [concept, other], prompts)
    swapped = replace(other, offsets={path: Gated(-edit.output) for path, edit in other.offsets.items()})
    assert np.abs(both - draw(pipeline, [concept, swapped], prompts)).max() > 0


def test_global_locking_takes_keys_from_the_class_word(pipeline, tuned, monkeypatch):
    requests = []

    def spy(base, plan, request, variables, **_):
        requests.append((request, variables))
        return sampling.Drawn(jnp.zeros((1, SIDE, SIDE, 3), jnp.uint8), jnp.ones(1, bool))

    monkeypatch.setattr(sampling, "generate", spy)
    spy.seconds = 0.0
    for lock in ("global", "local"):
        draw(pipeline, tuned[lock], ["a photo of a S* on the beach"])
    (request, variables), (local, _) = requests
    assert follows_class(variables.offsets, variables.gate) and local.class_ids is None
    np.testing.assert_array_equal(request.class_ids, pipeline.tokenizer.encode(["a photo of a robot on the beach"]))
    read = sampling.read(pipeline.base, request, variables.embeddings)
    np.testing.assert_array_equal(read.keys.context[1], pipeline.base.condition(request.class_ids).context[0])
    np.testing.assert_array_equal(read.keys.context[0], read.soft.context[0])  # the negative half holds no concept


def test_global_locking_keeps_positions_beside_an_embedding_of_several_vectors(pipeline, tuned, monkeypatch):
    requests = []

    def spy(base, plan, request, variables, **_):
        requests.append(request)
        return sampling.Drawn(jnp.zeros((1, SIDE, SIDE, 3), jnp.uint8), jnp.ones(1, bool))

    monkeypatch.setattr(sampling, "generate", spy)
    spy.seconds = 0.0
    vectors = np.repeat(np.asarray(pipeline.base.table)[[pipeline.tokenizer.word_id("fish")]], 3, axis=0)
    other = Concept(vectors, {}, "Q*", 1.0, pipeline.name, pipeline.fingerprint, "fish")
    draw(pipeline, [tuned["global"], other], ["a Q* photo of a S* in the snow"])
    [request] = requests
    wanted = pipeline.tokenizer.encode(["a fish fish fish photo of a robot in the snow"])
    np.testing.assert_array_equal(request.class_ids, wanted)
    vocabulary = request.soft_ids < pipeline.tokenizer.vocab_size
    np.testing.assert_array_equal(request.soft_ids[vocabulary], wanted[np.asarray(vocabulary)])


def test_keys_of_another_context(pipeline):
    """They are what attention's maps are of, and values are not."""
    base, rng = pipeline.base, np.random.default_rng(0)
    context, other = rng.standard_normal((2, 1, 5, WIDTH)).astype(np.float32)
    latents = rng.standard_normal((1, SIDE // 2, SIDE // 2, 4)).astype(np.float32)
    run = jax.jit(lambda unet, context, keys: unet(latents, 10, context, key_context=keys))
    # Values that are the same everywhere do not ask where they are taken from.
    flat = np.broadcast_to(context[:, :1], context.shape)
    np.testing.assert_allclose(run(base.unet, flat, other), run(base.unet, flat, context), rtol=1e-4, atol=1e-4)
    assert np.abs(run(base.unet, context, other) - run(base.unet, context, context)).max() > 1e-3

    layer = Attention(8, WIDTH, 1, 8, path="a", dtype=jnp.float32, rngs=nnx.Rngs(0))
    h = rng.standard_normal((1, 7, 8)).astype(np.float32)
    w = [float64(getattr(layer, name).kernel[...]) for name in ("to_q", "to_k", "to_v")]
    scores = np.exp((h[0] @ w[0]) @ (other[0] @ w[1]).T / np.sqrt(8))
    expected = scores / scores.sum(axis=1, keepdims=True) @ (context[0] @ w[2]) @ float64(layer.to_out[0].kernel[...])
    found = layer(jnp.asarray(h), jnp.asarray(context), key_context=jnp.asarray(other))[0]
    np.testing.assert_allclose(found, expected + float64(layer.to_out[0].bias[...]), rtol=1e-4, atol=1e-5)


# --- sizes


def test_a_file_for_stable_diffusion_is_about_100_kb(tmp_path):
    base = stable_diffusion("1.5", "float32")
    ids, word = jax.ShapeDtypeStruct((1, 77), jnp.int32), jax.ShapeDtypeStruct((1, 768), jnp.float32)
    read = functools.partial(jax.eval_shape, perfusion._class_word.function)
    state, outputs = read(base.only("text"), ids, word, perfusion._weights(base))
    state, outputs = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), (state, outputs))
    assert len(outputs) == 32 and sum(edit.output.size for edit in outputs.values()) == 24_960
    one = np.ones(1, np.float32)
    variables = Variables(np.zeros((1, 768), np.float32), outputs, Gate(state, state, one, one))
    sizes = {}
    for lock in ("local", "global"):
        embeddings, offsets, gate, *_ = perfusion.finish(jax.tree.map(jnp.asarray, variables), lock)
        save_concept(tmp_path / lock, Concept(embeddings, offsets, "S*", 1.0, "sd", "f", "dog", {}, gate))
        sizes[lock] = (tmp_path / lock).stat().st_size
    assert 100_000 < sizes["local"] < 120_000 and 50_000 < sizes["global"] < 65_000


# --- refusals


def test_bad_options_are_told(pipeline):
    for options, message in (
        ({"lock": "often"}, "option lock of perfusion is 'often', not one of: local, global, off"),
        ({"beta": "high"}, "option beta of perfusion is 'high', not a number"),
        ({"tau": 0}, "option tau of perfusion is 0, not a number above 0"),
        ({"tau": "-1"}, "option tau of perfusion is -1, not a number above 0"),
        ({"speed": 1}, "perfusion takes no option 'speed'; it takes: .*lock, beta, tau"),
    ):
        with pytest.raises(UserError, match=message):
            personalize(pipeline, options=options)
    with pytest.raises(UserError, match="edits at a class word of one token, and this one is "):
        personalize(pipeline, word="a robotfish")
    with pytest.raises(UserError, match="lora takes no option 'lock'; it takes: "):
        personalize(pipeline, method="lora", options={"lock": "off"})
    assert METHODS["lora"].with_options("lora", {}) is METHODS["lora"]


def test_bad_gates_are_told(pipeline, tuned, beginning):
    plain = Concept(beginning.embeddings, {}, "S*", 1.0, "tiny", pipeline.fingerprint, "robot")
    for concept, gate, message in (
        (plain, (0.7, 0.1), "there is none; leave --gate out"),
        (tuned["local"], (0.7, 0.0), "a finite beta and a tau above 0"),
        (tuned["local"], (np.nan, 0.1), "a finite beta and a tau above 0"),
    ):
        with pytest.raises(UserError, match=message):
            draw(pipeline, concept, gate=gate)


def test_what_cannot_be_combined_is_told(tuned):
    local, other = tuned["local"], replace(tuned["global"], token="T*")
    with pytest.raises(UserError, match="lock their keys in different ways"):
        compose([local, other])
    with pytest.raises(UserError, match="a gated concept has no weight"):
        compose([local], [0.5])
    path = next(iter(local.offsets))
    low_rank = replace(other, gate=None, offsets={path: LowRank(np.zeros((WIDTH, 1)), np.zeros((1, 8)))})
    with pytest.raises(UserError, match="combine concepts of one method"):
        compose([local, low_rank])


# --- the command line


def test_the_commands_take_gates_and_options(monkeypatch, tmp_path, capsys):
    given = {}

    def spy(pipeline, images, **options):
        given.update(options)
        raise UserError("enough")

    picture = tmp_path / "p.png"
    Image.fromarray(pictures(1)[0]).save(picture)
    monkeypatch.setattr(api, "personalize", spy)
    monkeypatch.setattr(commands, "load", lambda args, model: None)
    monkeypatch.setattr(compile_ahead, "without_weights", lambda pipeline: pipeline)
    argv = ["personalize", picture, "--method", "perfusion", "--prompt", "a S*", "--out", tmp_path / "o", "--option"]
    fails_last(capsys, "enough", *argv, "lock=off", "beta=0.6")
    assert given["options"] == {"lock": "off", "beta": "0.6"}
    for bad in (["lock"], ["=off"], ["lock=off", "lock=local"]):
        fails(capsys, "--option takes KEY=VALUE, each KEY once", *argv, *bad)
    generate = ["generate", "--prompt", "a dog", "--out", str(tmp_path), "--gate", "0.5", "0.1"]
    assert build_parser().parse_args(generate).gate == [0.5, 0.1]
    fails(capsys, "--gate is of concepts of perfusion", *generate)


def fails_last(capsys, match, *argv):
    """As `fails`, of a command that has said more."""
    assert main([str(a) for a in argv]) == 2
    assert match in capsys.readouterr().err.strip().splitlines()[-1]
