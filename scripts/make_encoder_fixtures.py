#!/usr/bin/env python3
"""Writes the tiny random-weight encoders under tests/fixtures/encoders/, with what sentence-transformers computes.

Each fixture is a folder as sentence-transformers or transformers saves it, with a tiny tokenizer, plus reference.json:
for each text (or pair of texts) its token ids, token types and the embedding, or the logits of a classifier. The
reference runs in f32 on the very values that are stored.

Needs torch, transformers (5 or newer), sentence-transformers (6 or newer) and tokenizers:

    python scripts/make_encoder_fixtures.py [NAME ...]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "encoders"

BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = "the a of to and in is cat dog sat on mat rust model query text server bird flies over lake".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-"

TEXTS = [
    "a",
    "the cat sat on the mat",
    "query: what is the capital of france?",
    "Rust is a language; servers in it are small, quick and dull, which is as it should be.",
    "the bird flies over the lake and the dog sat in the text of the model " * 3,
    "x1 y2 z3 " * 16,
]
PAIRS = [
    ("what is a cat?", "the cat sat on the mat"),
    ("rust", "Rust is a language; servers in it are small, quick and dull."),
    ("the lake", "the bird flies over the lake and the dog sat in the text of the model " * 3),
]

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
}


def tokenizer(specials):
    """A WordPiece tokenizer over a few words and letters."""
    vocab = list(specials) + WORDS + sorted(set(LETTERS) - set(WORDS)) + [f"##{c}" for c in LETTERS]
    vocab = {token: idx for idx, token in enumerate(dict.fromkeys(vocab))}
    roberta = specials is ROBERTA_SPECIALS
    unknown = "<unk>" if roberta else "[UNK]"
    inner = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if roberta:
        names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
        single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
        ends = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    else:
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        names |= {"mask_token": "[MASK]"}
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    inputs = ["input_ids", "attention_mask"] if roberta else ["input_ids", "token_type_ids", "attention_mask"]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=160, model_input_names=inputs, **names)
    return wrapped, len(vocab)


def last_token_tokenizer():
    """As decoders have it: one special token at the end."""
    wrapped, size = tokenizer(BERT_SPECIALS)
    inner = wrapped.backend_tokenizer
    end = ("[SEP]", inner.token_to_id("[SEP]"))
    inner.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[end])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=160, pad_token="[PAD]",
                                      eos_token="[SEP]", unk_token="[UNK]", padding_side="left",
                                      model_input_names=["input_ids", "attention_mask"])
    return wrapped, size


# family: class of transformers; config: beside SIZES; modules: what follows the transformer (None: a plain folder);
# dtype: of the stored weights; own_names: NomicBERT's keys from before transformers knew it; body_names: without "model."
FIXTURES = {
    "bert": dict(family="Bert", head="Model", modules=["mean", "normalize"], dtype="float32",
                 prompts={"query": "query: ", "document": ""}, default_prompt="document"),
    "bert_dense": dict(family="Bert", head="Model", config={"hidden_act": "gelu_new"},
                       modules=["cls", ("dense", 48, 40, True, torch.nn.Tanh()),
                                ("dense", 40, 24, False, torch.nn.Identity()), "normalize"]),
    "bert_plain": dict(family="Bert", head="ForMaskedLM", modules=None),
    "bert_rerank": dict(family="Bert", head="ForSequenceClassification", config={"num_labels": 1}),
    "bert_classify": dict(family="Bert", head="ForSequenceClassification", config={
        "id2label": {0: "contradiction", 1: "entailment", 2: "neutral"}}),
    "xlm_roberta": dict(family="XLMRoberta", head="Model", specials=ROBERTA_SPECIALS, modules=["cls", "normalize"],
                        config={"type_vocab_size": 1}),
    "xlm_roberta_rerank": dict(family="XLMRoberta", head="ForSequenceClassification", specials=ROBERTA_SPECIALS,
                               config={"type_vocab_size": 1, "num_labels": 1}, identity=True),
    "mpnet": dict(family="MPNet", head="ForMaskedLM", specials=ROBERTA_SPECIALS, modules=["mean", "normalize"],
                  config={"hidden_size": 64, "intermediate_size": 96}, dtype="float32"),
    "modernbert": dict(family="ModernBert", head="Model", modules=["mean"],
                       config={"num_hidden_layers": 4, "local_attention": 16}, legacy_rope=True),
    "modernbert_rerank": dict(family="ModernBert", head="ForSequenceClassification",
                              config={"num_hidden_layers": 2, "local_attention": 8, "num_labels": 1,
                                      "classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True,
                                      "attention_bias": True, "mlp_bias": True}),
    "nomic_bert": dict(family="NomicBert", head="Model", modules=["mean", "normalize"]),
    "nomic_bert_own": dict(family="NomicBert", head="Model", modules=["mean", "normalize"], own_names=True),
    "distilbert": dict(family="DistilBert", head="Model",
                       modules=[["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]]),
    "qwen3": dict(family="Qwen3", head="Model", modules=["lasttoken", "normalize"], body_names=True, decoder=True,
                  config={"num_key_value_heads": 2, "head_dim": 16},
                  prompts={"query": "instruct: find text\nquery: "}),
    "gemma3": dict(family="Gemma3Text", head="Model", decoder=True, body_names=True,
                   config={"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16,
                           "use_bidirectional_attention": True, "num_hidden_layers": 3,
                           "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
                   modules=["mean", ("dense", 48, 64, False, torch.nn.Identity()),
                            ("dense", 64, 48, False, torch.nn.Identity()), "normalize"]),
}


def build(spec, vocab_size, seed):
    """The model with random weights that its storage type represents exactly, in f32."""
    family, head = spec["family"], spec["head"]
    sizes = dict(SIZES)
    if family == "DistilBert":
        sizes = {"dim": 48, "hidden_dim": 72, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 192}
    config = {**sizes, "vocab_size": vocab_size, "pad_token_id": 0, **spec.get("config", {})}
    roberta = spec.get("specials") is ROBERTA_SPECIALS
    config |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2} if roberta else {
        "bos_token_id": 2, "eos_token_id": 3}
    if family == "ModernBert":
        config |= {"cls_token_id": 2, "sep_token_id": 3}
    config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(config)))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{head}")(config).eval()
    dtype = getattr(torch, spec.get("dtype", "bfloat16"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name.lower()
            if norm and name.endswith("weight"):
                value = 1.0 + 0.3 * noise - (1.0 if family.startswith("Gemma") else 0.0)
            elif parameter.ndim == 1:
                value = 0.3 * noise
            elif "embed" in name or "relative_attention_bias" in name:
                value = 0.7 * noise * (0.1 if family.startswith("Gemma") else 1.0)
            else:
                value = 1.2 * noise / parameter.shape[-1] ** 0.5
            parameter.copy_(value.to(dtype).float())
    return model, dtype


def own_names(folder):
    """Rewrites the config.json of a NomicBERT to the keys that its checkpoints were published with."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    keys = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
            "n_inner": "intermediate_size", "n_positions": "max_position_embeddings",
            "layer_norm_epsilon": "layer_norm_eps"}
    own = {new: config[old] for new, old in keys.items()}
    own |= {"architectures": ["NomicBertModel"], "model_type": "nomic_bert", "vocab_size": config["vocab_size"],
            "type_vocab_size": config["type_vocab_size"], "activation_function": "swiglu", "prenorm": False,
            "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "rotary_emb_fraction": 1.0,
            "rotary_emb_base": 1000, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
            "rotary_scaling_factor": None, "use_rms_norm": False}
    path.write_text(json.dumps(own, indent=2) + "\n")


def legacy_rope(folder):
    """ModernBERT's keys from before transformers 5."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.pop("layer_types")
    config |= {"global_rope_theta": rope["full_attention"]["rope_theta"],
               "local_rope_theta": rope["sliding_attention"]["rope_theta"], "global_attn_every_n_layers": 3}
    path.write_text(json.dumps(config, indent=2) + "\n")


def body_names(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stored(model, dtype, folder):
    """Saves `model` as `dtype`."""
    import copy

    model = copy.deepcopy(model).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)


def rounded(values):
    return [float(f"{value:.8g}") for value in values]


@torch.no_grad()
def make(name, spec):
    wrapped, size = last_token_tokenizer() if spec.get("decoder") else tokenizer(spec.get("specials", BERT_SPECIALS))
    model, dtype = build(spec, size, seed=1 + sum(map(ord, name)))
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    classifier = spec["head"] == "ForSequenceClassification"
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        wrapped.save_pretrained(temporary)
        options = {"attn_implementation": "eager"}
        if classifier:
            activation = torch.nn.Identity() if spec.get("identity") else None
            runner = CrossEncoder(temporary, activation_fn=activation, device="cpu", model_kwargs=options)
            if spec.get("identity"):
                model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        else:
            transformer = Transformer(temporary, model_kwargs=options, max_seq_length=160)
            modules = [transformer]
            for module in spec["modules"] or ["mean"]:
                if module == "normalize":
                    modules.append(Normalize())
                elif isinstance(module, tuple):
                    _, wide, narrow, bias, activation = module
                    dense = Dense(wide, narrow, bias=bias, activation_function=activation)
                    generator = torch.Generator().manual_seed(wide)
                    for parameter in dense.parameters():
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.copy_(noise / wide**0.5)
                    modules.append(dense)
                else:
                    modules.append(Pooling(transformer.get_embedding_dimension(), pooling_mode=module))
            runner = SentenceTransformer(modules=modules, device="cpu", prompts=spec.get("prompts"),
                                         default_prompt_name=spec.get("default_prompt"))
    records = []
    for text in PAIRS if classifier else TEXTS:
        encoded = wrapped(*text, truncation=True) if classifier else wrapped(text, truncation=True)
        ids = encoded["input_ids"]
        types = encoded.get("token_type_ids", [0] * len(ids))
        record = {"input_ids": ids, "token_type_ids": types}
        if classifier:
            logits = runner.predict([text], activation_fn=torch.nn.Identity(), convert_to_tensor=True)
            record |= {"text": text[0], "text_pair": text[1], "output": rounded(logits.flatten().tolist())}
        else:
            embedding = runner.encode([text], prompt="", convert_to_tensor=True, normalize_embeddings=False)[0]
            record |= {"text": text, "output": rounded(embedding.tolist())}
        records.append(record)
    if classifier or spec["modules"] is None:
        stored(model, dtype, folder)
        wrapped.save_pretrained(folder)
    else:
        runner.save(str(folder), create_model_card=False)
        for extra in ["README.md"]:
            (folder / extra).unlink(missing_ok=True)
        stored(model, dtype, folder)
    if spec.get("own_names"):
        own_names(folder)
    if spec.get("legacy_rope"):
        legacy_rope(folder)
    if spec.get("body_names"):
        body_names(folder)
    (folder / "reference.json").write_text(json.dumps({"records": records}, separators=(",", ":")) + "\n")
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{name}: {total / 1024:.0f} KiB, up to {max(len(r['input_ids']) for r in records)} tokens", flush=True)


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or list(FIXTURES):
        make(name, FIXTURES[name])


if __name__ == "__main__":
    main()
