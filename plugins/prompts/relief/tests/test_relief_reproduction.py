"""The reproduction runs on small graphs, and molecules are read as they should be."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("looseleaf_lab", reason="needs looseleaf-lab")

from looseleaf.resume import as_plain
from looseleaf_lab.study import Results
from looseleaf_relief import reproduction
from looseleaf_relief.data import few_shot, freesolv, molecule, pretrain, scaffold, shaded, solubility

SCALE = reproduction.Scale(other_shots=(10,), draws=1, epochs=1, z_max=(0.5,), rates=(5e-3,), planted=8, made_up=True)
ROWS = [{"set": "freesolv", "smiles": "C" * (2 + n % 5) + "O" * (n % 2), "value": float(n % 7)} for n in range(12)] + [
    {"set": "freesolv", "smiles": ring + "C" * n, "value": float(n)} for n in range(3)
    for ring in ("c1ccncc1", "C1CCCC1", "C1CC1", "c1ccsc1")] + [
    {"set": "solubility", "smiles": "C" * n + "O", "label": label, "part": part, "value": 0.0}
    for n in range(1, 5) for label in ("low", "medium", "high") for part in ("train", "test")]


def test_one_seed_and_its_report() -> None:
    row = as_plain(reproduction.measure(0, SCALE))
    text = str(reproduction.study.report(Results([row], as_plain(reproduction.once(SCALE)), [0], SCALE, True)))
    assert row["frozen"] and text.count("[holds]") == 1 and text.count("[not shown at this scale]") == 10
    assert set(row["score"]["freesolv"]) == {"RELIEF", "linear probe", "random prompt", "fine-tuning", "GPF",
                                             "GPF-plus", "SUPT"}
    assert 0 < row["coverage"]["freesolv"]["PCR"] <= 1


def test_molecules() -> None:
    pytest.importorskip("rdkit", reason="needs rdkit")
    graph = molecule("C=CO")
    assert graph.x.tolist() == [[6, 0], [6, 0], [8, 0]]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]] and graph.edge_attr.tolist() == [1, 1, 0, 0]
    assert molecule("C").edge_index.shape == (2, 0) and molecule("[H][H]").num_nodes and molecule("c1cccn1(H)") is None
    assert scaffold("CCO") == "" and scaffold("Cc1ccccc1") == "c1ccccc1"
    assert shaded("CCO", [0.0, 1.0, 0.5])[:4] == b"\x89PNG"


def test_tasks_of_molecules() -> None:
    pytest.importorskip("rdkit", reason="needs rdkit")
    pool, test = freesolv(ROWS, 0)
    assert test and not {scaffold(e.inputs["smiles"]) for e in pool} & {scaffold(e.inputs["smiles"]) for e in test}
    assert {e.target for e in pool} == {0, 1}
    train, held = solubility(ROWS, 4)
    assert len(train) == len(held) == 6  # no medium, no more than four atoms
    assert len(few_shot("t", pool, test, shots=4, dev=2, seed=0).train) == 4


@pytest.mark.parametrize("kind", ["masking", "contrastive"])
def test_pretraining_learns(kind) -> None:
    pytest.importorskip("rdkit", reason="needs rdkit")
    graphs = [molecule(s) for s in ("CCO", "c1ccccc1O", "CC(=O)N", "C1CCNCC1", "CCCCF", "OCC(N)C", "CC#N", "ClCCBr")]
    network, losses = pretrain(graphs, kind, steps=25, batch_size=8)
    assert sum(losses[-5:]) < sum(losses[:5]) and not network.model.training
    assert torch.isfinite(network.embed(network.collate(graphs))).all()
