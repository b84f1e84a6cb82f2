"""placeholder"""
study = None
