"""Load and run a trained policy: observations in, actions out.

action_transforms  recorded actions to robot commands, and back
bundle             the folder of a policy: config, expert, normalizers, editor
policy             `Policy.load(DIR).act(observation)`
acting             receding horizon over any source of action chunks; the baselines
loading            load a run, a bundle or an ONNX export
proprio            the robot state as a token of the editor's text
"""
