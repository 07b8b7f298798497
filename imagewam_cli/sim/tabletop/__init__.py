"""The embedded environment `tabletop`: a table seen from above, a gripper, blocks, zones and an instruction.

    scene          scenes and tasks sampled from a seed
    world          positions, dynamics, success
    render         pictures of a world, drawn with numpy and Pillow
    demonstrator   the scripted demonstrator
    edits          training examples for an image editor, and the judge of an edited picture
    env            the gymnasium environment

Lengths are in table units. The table is the unit square: x points right, y points down, as in the picture.
"""
