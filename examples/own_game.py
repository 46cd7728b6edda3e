"""Your own game, from recording to agent, in Python. Run: ... own_game.py [ENV] [FOLDER] [--quick]

The same as five ``worldgym`` commands (README). Any Gymnasium env that shows a picture will do.
"""

import sys
from pathlib import Path

from worldgym.agents.compare import score_all, text_table
from worldgym.agents.games import record, remember_task
from worldgym.agents.model import load_agent
from worldgym.agents.train import TrainConfig, train_in_dream
from worldgym.envs.tasks import load_task
from worldgym.train.fit import FitConfig, fit

quick = "--quick" in sys.argv
names = [a for a in sys.argv[1:] if not a.startswith("--")]
env = names[0] if names else "MiniGrid-Dynamic-Obstacles-6x6-v0"
out = Path(names[1] if len(names) > 1 else "runs/own_game")

print(record(env, out / "data", 400 if quick else 20_000, ("random", "sticky:0.3"),
             frame_hw=(48, 48)))
small = {"codec_iterations": 2, "dynamics_iterations": 2, "outcome_iterations": 2, "batch": 2,
         "clip": 6, "width": 32, "layers": 1, "measure": False, "tensorboard": False}
fit(FitConfig(data=str(out / "data"), out=str(out / "world"), **(small if quick else {})))
remember_task(out / "data", out / "world")  # which real game to score in
task = load_task(out / "world")
config = TrainConfig(steps=256 if quick else 300_000, envs=8 if quick else 64,
                     hyperparameters={"n_steps": 8, "batch_size": 32} if quick else {})
agent = load_agent(train_in_dream(task, config, out / "agent").agent, world=task.world)
print(text_table(score_all(task, {"agent": agent, "random": "random"}, 2 if quick else 100)))
