"""What a dataset or a whole chain of runs will take: rows, disk, hours, money and CO2, from rates and their sources."""
