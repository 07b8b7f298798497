"""How good a policy is, in numbers and pictures.

    statistics    success rates with Wilson intervals
    closed_loop   success of rolled-out episodes per split and kind of task; evaluation in a simulator
    open_loop     planned against recorded actions of a dataset, beside the best constant chunk
    pictures      contact sheets, GIFs and MP4s of episodes
    plots         curves and bars; needs the extra `plots`
    atomic        files that are written whole or not at all

Nothing is imported here, so that the numbers need neither PyAV nor matplotlib.
"""
