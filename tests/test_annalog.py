"""annalog's transformer: against torch's own layers, and its files read without running them."""

from __future__ import annotations

import pickle

import draws
import numpy as np
import pytest
import real_models

from leangen import exporters
from leangen.errors import SourceError
from leangen.exporters import annalog
from leangen.families import language, text_to_text
from leangen.families.decoder import Decoder
from leangen.session import Session

torch = pytest.importorskip("torch", reason="the export extra is not installed")

WORDS = ["<unk>", "<pad>", "<sos>", "<eos>", *"CNOcn()=123", "Br", "[C@H]", "%10"]
WIDTH, HIDDEN, CONTEXT = 64, 96, 40


class Whole(torch.nn.Module):
    """The model of torch's own layers."""

    def __init__(self):
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True, "norm_first": False}
        nn = torch.nn
        size = (WIDTH, WIDTH // annalog.HEAD_DIM, HIDDEN)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(*size, **options) for _ in "ab")
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(*size, **options) for _ in "abc")
        self.tok = nn.ModuleList(nn.Embedding(len(WORDS), WIDTH) for _ in "ed")
        self.pos = nn.ModuleList(nn.Embedding(CONTEXT, WIDTH) for _ in "ed")
        self.head = nn.Linear(WIDTH, len(WORDS))

    def forward(self, source, target):
        x, y = (
            self.tok[side](ids) * WIDTH**0.5 + self.pos[side](torch.arange(ids.shape[1]))
            for side, ids in enumerate((source, target))
        )
        for layer in self.encoder:
            x = layer(x)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        for layer in self.decoder:
            y = layer(y, x, tgt_mask=mask)
        return self.head(y)

    def stored(self):
        """Its weights under annalog's names."""
        out = {"decoder.fc_out": self.head}
        for side, layers in enumerate((self.encoder, self.decoder)):
            stack = ("encoder", "decoder")[side]
            out |= {f"{stack}.tok_embedding": self.tok[side]}
            out |= {f"{stack}.pos_embedding": self.pos[side]}
            for i, layer in enumerate(layers):
                stem = f"{stack}.layers.{i}"
                parts = {"self_attention": layer.self_attn}
                norms = {"self_attn_layer_norm": layer.norm1, "ff_layer_norm": layer.norm2}
                if side:
                    parts["encoder_attention"] = layer.multihead_attn
                    norms["enc_attn_layer_norm"] = layer.norm2
                    norms["ff_layer_norm"] = layer.norm3
                out |= {f"{stem}.{name}": norm for name, norm in norms.items()}
                out |= {f"{stem}.positionwise_feedforward.fc_1": layer.linear1}
                out |= {f"{stem}.positionwise_feedforward.fc_2": layer.linear2}
                for name, attention in parts.items():
                    out[f"{stem}.{name}.fc_o"] = attention.out_proj
                    for kind in ("weight", "bias"):
                        joint = getattr(attention, f"in_proj_{kind}").chunk(3)
                        out |= {
                            f"{stem}.{name}.fc_{label}.{kind}": part
                            for label, part in zip("qkv", joint, strict=True)
                        }
        state = {}
        for name, value in out.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.detach().clone()
            else:
                state |= {f"{name}.{key}": part for key, part in value.state_dict().items()}
        return state


def saved(folder, change=lambda state: None, words=WORDS):
    torch.manual_seed(0)
    model = Whole().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = model.stored()
    change(state)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "tiny.pt")
    (folder / "tiny_vocab.pkl").write_bytes(pickle.dumps({"itos": words, "stoi": {}}))
    return model, folder / "tiny.pt"


def test_logits_are_those_of_torchs_layers(tmp_path):
    model, path = saved(tmp_path / "saved")
    assert exporters.find(path) is annalog
    session = Session(exporters.export(path, tmp_path / "bundle"), threads=1)
    rng = draws.rng()
    source, target = (rng.integers(4, len(WORDS), n).tolist() for n in (23, 30))
    with torch.no_grad():
        expected = model(torch.tensor([source]), torch.tensor([target]))[0].numpy()
    states = text_to_text.encoded(session, source)
    with Decoder(session, CONTEXT, role="decoder", beside=states) as decoder:
        whole = decoder.feed_all(target).copy()
        decoder.rewind(0)
        steps = [decoder.feed([token]).copy() for token in target]
    scale = 1e-4 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(whole, expected, atol=scale)
    np.testing.assert_allclose(steps, expected, atol=scale)


def test_atoms_are_tokens(tmp_path):
    _, path = saved(tmp_path / "saved")
    session = Session(exporters.export(path, tmp_path / "bundle"), threads=1)
    smiles = "CC(=O)N%10c1[C@H]Br"
    tokens = language.tokens_of(session, text_to_text.Request(prompt=smiles))
    named = [WORDS[token] for token in tokens]
    assert named == ["<sos>", *"CC(=O)N", "%10", "c", "1", "[C@H]", "Br", "<eos>"]
    assert language.tokenizer(session).decode(tokens) == smiles


def test_what_is_damaged_or_unsafe_is_refused(tmp_path):
    def fails(match, **options):
        _, path = saved(tmp_path / "saved", **options)
        with pytest.raises(SourceError, match=match):
            exporters.export(path, tmp_path / "out")

    fails("missing", change=lambda s: s.pop("decoder.layers.1.self_attention.fc_q.weight"))
    fails("no model of annalog", change=lambda s: s.pop("encoder.pos_embedding.weight"))
    fails("no vocabulary of annalog", words=["C", "N"])
    _, path = saved(tmp_path / "saved")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot be read safely|can be read safely"):
        exporters.export(path, tmp_path / "out")

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": Evil()}, path)
    with pytest.raises(SourceError, match="can be read safely"):
        exporters.export(path, tmp_path / "out")
    path.with_name("tiny_vocab.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SourceError, match="refused"):
        exporters.export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_most_of_its_molecules_are_valid():
    chem = pytest.importorskip("rdkit.Chem")
    real_models.source("annalog")
    session = Session(real_models.store().resolve("annalog"))
    request = text_to_text.Request(prompt="CC(=O)Oc1ccccc1C(=O)O", n=30, temperature=1.0)
    texts = {}
    for step in text_to_text.run(session, request):
        texts[step.sample] = texts.get(step.sample, "") + step.text
    assert sum(chem.MolFromSmiles(text) is not None for text in texts.values()) >= 21
