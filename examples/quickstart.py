"""Step a dream like any Gymnasium environment. Run: ... quickstart.py [WORLD] [STEPS]"""

import sys

from worldgym.envs.make import make_dream

world = sys.argv[1] if len(sys.argv) > 1 else "worldgym/TakeCover-v0"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100

env = make_dream(world, render_mode="rgb_array")
observation, info = env.reset(seed=0)
env.action_space.seed(0)
total = 0.0
for t in range(steps):
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    total += reward
    if terminated or truncated:
        print(f"episode over after {t + 1} steps, return {total:g}")
        observation, info = env.reset()
        total = 0.0
print(f"last frame: {env.render().shape}, {env.render().dtype}")
twin = env.fork(1)[0]  # the same moment again: try something else from here
print("forked:", type(twin).__name__)
env.close()
