"""Models in the released format, both ways.  Parameter names are the released ones, so nothing is converted.

    folder/tokenizer.json
    folder/cola_vae/config.json, model.safetensors      (or shards with model.safetensors.index.json)
    folder/cola_dit/config.json, model.safetensors
"""

import dataclasses
import json
import re
import reprlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import check_regular, replacing
from data import load_tokenizer
from dit import ROPE_THETA, DiT, DiTConfig
from transformer import rope_freqs
from vae import TextVAE, VAEConfig

# Names of our configuration fields in the released config.json, where they differ.
VAE_NAMES = dict(
    n_head="num_heads",
    n_encoder_layer="encoder_num_blocks",
    n_decoder_layer="decoder_num_blocks",
    norm_eps="layer_norm_eps",
)
DIT_NAMES = dict(
    latent_dim="txt_in_channels",
    dim="txt_dim",
    n_head="heads",
    n_layer="num_layers",
    mlp_ratio="expand_ratio",
)
# The rest of the released configuration.  Other values would be another computation: they are refused.
VAE_FIXED = dict(
    act="swiglu",
    block_causal=True,
    causal=False,
    clip_qkv=None,
    layer_norm_affine=True,
    layer_norm_type="layer_norm",
    qk_norm_affine=True,
    rope_full_precision=True,
    shared_heads_kv=1,
)
DIT_FIXED = dict(patch_size=1)


def load_vae_config(folder):
    """The VAEConfig in folder/cola_vae."""
    raw = read_json(Path(folder) / "cola_vae" / "config.json")
    return to_config(VAEConfig, raw, VAE_NAMES, VAE_FIXED, Path(folder) / "cola_vae")


def load_vae(folder, device="cpu", dtype=torch.float32):
    """The TextVAE in folder/cola_vae."""
    return load_weights(TextVAE, load_vae_config(folder), Path(folder) / "cola_vae", device, dtype)


def load_dit_config(folder):
    """The DiTConfig in folder/cola_dit."""
    raw = read_json(Path(folder) / "cola_dit" / "config.json")
    fixed = DIT_FIXED | dict(emb_dim=raw.get("txt_dim", DiTConfig.dim))
    fixed |= dict(txt_out_channels=raw.get("txt_in_channels", DiTConfig.latent_dim))
    return to_config(DiTConfig, raw, DIT_NAMES, fixed, Path(folder) / "cola_dit")


def load_dit(folder, device="cpu", dtype=torch.float32):
    """The DiT in folder/cola_dit."""
    return load_weights(DiT, load_dit_config(folder), Path(folder) / "cola_dit", device, dtype)


def save_vae(vae, folder, dtype=torch.float32):
    """Write folder/cola_vae."""
    raw = to_raw(vae.config, VAE_NAMES) | VAE_FIXED
    raw |= dict(use_emb=True, dropout=0.0, attn_dropout=0.0, init_fn="normal", init_cutoff_factor=3)
    raw |= dict(model_type="cola_text_vae", architectures=["ColaTextVAEModel"])
    save_weights(vae.state_dict(), raw, Path(folder) / "cola_vae", dtype)


def save_dit(dit, folder, dtype=torch.float32):
    """Write folder/cola_dit."""
    raw = to_raw(dit.config, DIT_NAMES) | DIT_FIXED
    raw |= dict(emb_dim=dit.config.dim, txt_out_channels=dit.config.latent_dim)
    raw |= dict(model_type="cola_dit", architectures=["ColaDiTModel"])
    freqs = {name: rope_freqs(dit.config.rope_dim, ROPE_THETA) for name in rope_names(dit.config)}
    save_weights(dit.state_dict() | freqs, raw, Path(folder) / "cola_dit", dtype)


def rope_names(config):
    """Names of what the released files hold besides: the rotary frequencies of every block.  Nothing here needs them,
    other readers may."""
    return [f"blocks.{i}.msa.rope.rope.freqs" for i in range(config.n_layer)]


def to_config(cls, raw, names, fixed, folder):
    fields = {f.name: names.get(f.name, f.name) for f in dataclasses.fields(cls)}
    try:
        config = cls(**{ours: raw[theirs] for ours, theirs in fields.items() if theirs in raw})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for name, value in fixed.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{folder}: {name} = {reprlib.repr(raw[name])} is not supported, only {value!r}")
    with suppress(FileNotFoundError):  # a run that has lost its weights can be resumed
        n = len(weight_files(folder))
        for name, value in vars(config).items():
            if name.endswith("_layer") and value > n:  # whoever builds so many waits for hours
                raise ValueError(f"{folder}: {name} {value} is more than the {n} tensors of its files")
    return config


def to_raw(config, names):
    """The released fields, and those of ours that differ from their defaults: all others read back as they were."""
    fields = dataclasses.fields(config)
    written = [f for f in fields if not f.metadata.get("ours") or getattr(config, f.name) != f.default]
    return {names.get(f.name, f.name): getattr(config, f.name) for f in written}


def read_json(path):
    try:
        check_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: is this a model folder?") from None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def weight_files(folder):
    """{tensor name: file} of one model.safetensors or of all shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ValueError(f"{index} has no weight_map of file names")
        for file in names.values():
            if not re.fullmatch(r"[\w.-]+\.safetensors", file):  # so no path leads out of the folder
                raise ValueError(f"{index} names {reprlib.repr(file)}: it must be a .safetensors file in that folder")
        return {name: folder / file for name, file in names.items()}
    file = folder / "model.safetensors"
    with open_weights(file) as tensors:
        return {name: file for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def open_weights(file, device="cpu"):
    check_regular(file)
    with open(file, "rb"):  # raises what says best why a file cannot be opened
        pass
    try:
        return safe_open(file, framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from None


STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def load_weights(cls, config, folder, device, dtype):
    """Build the model without memory, then give it the tensors of the files; names and shapes must match exactly.

    Files are memory-mapped and tensors go to `device` and `dtype` one by one: there is never a second copy of them."""
    files = weight_files(folder)
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no tensor can have
        raise ValueError(f"{folder}: the configuration cannot be built: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = set(rope_names(config)) if cls is DiT else set()
    missing, extra = sorted(expected.keys() - files.keys()), sorted(files.keys() - expected.keys() - optional)
    if missing or extra:
        count = f"{len(missing)} tensors are missing and {len(extra)} are unknown"
        raise ValueError(f"{folder} does not match its configuration: {count}, first {(missing + extra)[0]}")
    state = {}
    for file in sorted(set(files.values())):
        with open_weights(file, device) as tensors:
            names = set(tensors.keys())
            for name in (n for n in expected if files[n] == file):
                if name not in names:
                    raise ValueError(f"{file} does not hold {name}, though the index says so")
                stored = tensors.get_slice(name)
                shape = tuple(stored.get_shape())
                if shape != expected[name]:
                    raise ValueError(f"{file}: {name} has shape {shape}, the configuration asks for {expected[name]}")
                if stored.get_dtype() not in (allowed := [*STORED_DTYPES.values()]):
                    raise ValueError(f"{file}: {name} holds {stored.get_dtype()}, only {', '.join(allowed)} are read")
                if stored.get_dtype() == STORED_DTYPES.get(dtype):  # on a CPU a view of the file, read when it is used
                    state[name] = tensors.get_tensor(name)
        for name in (n for n in expected if files[n] == file and n not in state):
            with open_weights(file, device) as tensors:  # anew for each, so that pages read before are given back
                state[name] = tensors.get_tensor(name).to(dtype)
    model.load_state_dict(state, assign=True)
    return model


def save_weights(state, raw_config, folder, dtype):
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype}: this model is broken, and not written to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(".tmp*"):  # of safetensors, in a process that was killed
        rest.unlink()
    raw_config = raw_config | dict(dtype=str(dtype).removeprefix("torch."))
    with replacing(folder / "model.safetensors") as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"could not write {folder}: {error}") from None
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # or the shards of an older model would be read
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(raw_config, indent=2, sort_keys=True, allow_nan=False) + "\n")


def find_tokenizer(folder, vocab_size, required=False):
    """tokenizer.json beside the two model folders, inside one of them, or one folder up; None if there is none.
    Raises ValueError if it has ids outside the vocabulary, FileNotFoundError if it is required and there is none."""
    folder = Path(folder)
    for place in (folder, folder / "cola_dit", folder / "cola_vae", folder.resolve().parent):
        if (place / "tokenizer.json").exists():
            check_regular(place / "tokenizer.json")
            tokenizer = load_tokenizer(str(place / "tokenizer.json"))
            if tokenizer.n_vocab > vocab_size:
                raise ValueError(f"{place}/tokenizer.json has {tokenizer.n_vocab} ids, the model {vocab_size}")
            return tokenizer
    if required:
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    return None
