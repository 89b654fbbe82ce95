"""Plan → cells → execute → results, over a content-addressed store that resumes."""
