"""The science, pure: schedules, noise, objectives, bounds and samplers, from arrays to arrays.

Some arguments mean the same everywhere, and are not explained again:

    x_0, x_t       token ids, clean and noised; those from mask_id on are the mask and padding
    mask_id        the id of a masked token, and the number of real tokens; it and larger ids are never predicted
    t, s           times in [0, 1], s < t; at 0 nothing is noise, at 1 all is
    mask_rate, m   1 - alpha(t), how much is noise, in [0, 1]
    key            randomness; the same key gives the same result
    segment_ids    which document of its row each position belongs to

Shapes: B rows of L tokens, K blocks in a row, V ids that the network scores, of which the last may be padding.
"""
