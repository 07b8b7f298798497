"""Run a trained policy in your own loop: load it, reset it, and ask for one action at a time.

python examples/act.py runs/tiny-tabletop --scene 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from imagewam_cli.policy.policy import Policy
from imagewam_cli.sim.tabletop.env import TabletopEnvironment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", type=Path, help="folder of a run or a bundle")
    parser.add_argument("--scene", type=int, default=0, help="number of the scene")
    arguments = parser.parse_args()

    policy = Policy.load(arguments.policy)
    env = TabletopEnvironment()
    observation = env.reset(arguments.scene, "test")
    print(observation.instruction)

    policy.reset()
    for step in range(env.max_steps):
        result = env.step(policy.act(observation))
        observation = result.observation
        if result.finished:
            print(f"{'success' if result.success else 'no success'} after {step + 1} steps")
            break


if __name__ == "__main__":
    main()
