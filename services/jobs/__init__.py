"""The life of a job: what a user may ask for, when a job starts, and what is done about what happens to it.

*Operations*: create, pause, resume, cancel, scale. *Admission*: starts waiting jobs as room appears. *Controller*: one
thread for each job that holds resources. *Policy*: decides what a death means; the controller acts on it.
*Access*: what each call takes, and whether who makes it may.
"""
