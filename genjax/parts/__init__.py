"""The mathematics that families share: functions of arrays and keys, without parameters of their
own.
"""
