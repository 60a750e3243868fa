"""Give stored rows the energy that today's would have."""
import sys
from pathlib import Path
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
from lab import files
from lab.models.checkpoint import model_from_checkpoint
from lab.report.rows import read_row
from ptq.recipe import Recipe
from ptq.analysis.energy import energy_by_prices
nets, found = {}, {}
for path in sorted([*Path("results").glob("*/*@*.json"), *Path("results").glob("*/ablation/*@*.json")]):
    row = read_row(path)
    ck = row["checkpoint"]
    if ck not in nets:
        nets[ck] = (model_from_checkpoint(ck)[0], files.sha256(ck)) if Path(ck).exists() else None
    if nets[ck] is None or nets[ck][1] != row["checkpoint_sha256"]:
        print(path, "left out: other weights"); continue
    key = (ck, str(row["recipe"]), row["img_size"])
    if key not in found:
        try:
            found[key] = energy_by_prices(nets[ck][0], Recipe.fromdict(row["recipe"]), torch.zeros(1, 3, row["img_size"], row["img_size"]))
        except ValueError as e:
            print(path, e); continue
    new = {}
    for k, v in row.items():
        new[k] = v
        if k == "products":
            new["energy"] = found[key]
    files.write_json(path, new)
