"""A trained policy: observation in, action out.

action_transforms  recorded actions to robot commands, and back
bundle     the folder of a policy: config, expert, statistics, editor
policy     `Policy.load(DIR).act(observation)`
acting     receding horizon over any source of action chunks; the baselines
"""
