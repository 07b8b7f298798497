"""The action expert: a small diffusion transformer that attends, layer by layer, to an editor's prefix KV.

flow               schedule, noise, Euler grid
attention          joint softmax over [prefix | own tokens], rotary positions
attention_probe    the attention weights of the action tokens
token_coordinates  picture coordinates added to the values of prefix tokens
blocks             sequential and parallel blocks, modulation, time embedding
model              `ActionExpert`: velocity of a noisy action chunk
sampler            the Euler loop
initialization     initial weights from the editor's
checkpoint         config and weights on disk
"""
