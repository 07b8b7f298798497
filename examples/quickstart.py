"""Record demonstrations, train a policy on them, evaluate it and export it. Takes a few minutes on two CPU cores.

python examples/quickstart.py [FOLDER]

Open it as a notebook in an editor that knows `# %%` cells, or run it as a script. The sizes are so small that the
policy learns little: `imagewam demo` uses sizes that give a good policy.
"""

# %% Record demonstrations of the embedded simulator, or open a LeRobot dataset of your own
import sys
from pathlib import Path

import imagewam_cli as iw

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart")
data = iw.record(folder / "dataset", episodes=6)
# data = iw.open_dataset("datasets/mine", cameras=["top"])
print(f"{data.info.total_episodes} episodes, {data.info.total_rows} frames, cameras {list(data.info.cameras)}")

# %% Load an image editor: `imagewam editors` lists those that are installed
editor = iw.load_editor("tiny", dataset=data)
print(f"one row: {editor.spec.bytes_per_row(2) / 1000:.0f} kB in {len(editor.spec.layers)} layers")

# %% Store its prefix keys and values: every tenth frame, a sixteenth of the bytes of bfloat16
cache = iw.build_cache(data, editor, folder / "cache", codec="pca1", stride=10)
print(f"{len(cache)} rows")

# %% Look at one row: K and V are (rows, tokens, heads, head size), as the editor's softmax sees them
prefix = cache.read([0])
print({layer.name: tuple(kv.k.shape) for layer, kv in zip(editor.spec.layers, prefix.layers, strict=True)})

# %% Train an action expert on the cache
run = iw.train(cache, folder / "run", steps=20, batch=16)
print(run.validation)

# %% Act: one observation in, one action out; the policy plans a new chunk when the last one is used up
policy = iw.load_policy(run)
row = next(data.rows())
print(policy.act(row.observation()))

# %% Judge: success in the simulator on scenes that no demonstration shows
result = iw.evaluate(policy, episodes=1, splits=["test"])
print(result.splits["test"].total.success)

# %% Ship: ONNX graphs that run without torch, checked against torch on real rows
print(iw.export_policy(run, folder / "onnx").errors)
