"""`tabletop`: the embedded environment. A table seen from above, a gripper, blocks, zones and an instruction.

    scene    scenes and tasks sampled from a seed
    world     positions, dynamics, success
    render    pictures of a world, with numpy and Pillow alone
    expert    the scripted demonstrator
    edits     (picture now, instruction, picture when done) triples, and the judge of an edited picture
    env       the gymnasium environment

All lengths are in table units: the table is the unit square, x to the right, y downwards as in the picture.
"""
