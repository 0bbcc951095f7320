"""The number of parameters of each network, for tests of the networks and of the recipes."""

PARAMETERS = {
    "ms_ran": 443_994,
    "resnet18": 11_175_370,
    "resnet34": 21_283_530,
    "resnet50": 23_522_250,
    "resnet101": 42_514_378,
    "resnet152": 58_158_026,
    "simple_cnn": 21_614,
    "mnistnet": 108_864,
    "mnistnet_25k": 24_331,
    "mnistnet_13k": 13_223,
    "model_v1": 7_720,
    "model_v2": 7_730,
    "model_v3": 8_650,
    "lenet5": 61_706,
    "small_cnn": 59_630,
    "patch_cnn": 22_346,
    "separable_cnn": 7_914,
}
"""Name of a network -> parameters with its default arguments. mnistnet_25k and mnistnet_13k are names of recipes."""
