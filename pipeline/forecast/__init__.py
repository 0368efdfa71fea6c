"""What a build will weigh, take and need, before it starts: pure functions of a few sizes.

`subject` says what is built; `weights`, `activations` and `device` weigh it on the target GPU, rank by
rank; `host`, `disk` and `rates` say what each stage takes on this machine; `changes` searches the
nearest builds that fit where this one does not; `advice` says what is legal, and may disappoint.
`tables`, `document` and `picture` show all that. Nothing heavy is imported: matplotlib only for a
picture.
"""
