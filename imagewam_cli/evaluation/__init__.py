"""Evaluate a policy, in numbers and pictures.

    statistics    success rates with Wilson intervals
    closed_loop   success of rolled-out episodes per split and kind of task; evaluation in a simulator
    open_loop     planned against recorded actions of a dataset, compared with the best constant chunk
    attention     where a policy's action tokens attend, and how much attention falls on the regions that change
    pictures      contact sheets, GIFs and MP4s of episodes
    plots         curves and bars; needs the extra `plots`

This module imports nothing, so that computing numbers needs neither PyAV nor matplotlib.
"""
