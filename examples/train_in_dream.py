"""Train PPO inside a dream, score it in the game. Run: ... train_in_dream.py [WORLD] [STEPS]"""

import sys
import tempfile

from worldgym.agents.compare import score_all, text_table
from worldgym.agents.model import load_agent
from worldgym.agents.train import TrainConfig, train_in_dream
from worldgym.envs.tasks import load_task

world = sys.argv[1] if len(sys.argv) > 1 else "worldgym/TakeCover-v0"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200_000
episodes = 20 if steps > 10_000 else 2

task = load_task(world)
with tempfile.TemporaryDirectory() as folder:
    config = TrainConfig(steps=steps, envs=64 if steps > 10_000 else 8, save_every=steps,
                         hyperparameters={} if steps > 10_000 else {"n_steps": 8, "batch_size": 16})
    trained = train_in_dream(task, config, folder)
    agent = load_agent(trained.agent, world=task.world)
    print(text_table(score_all(task, {"agent": agent, "random": "random"}, episodes)))
