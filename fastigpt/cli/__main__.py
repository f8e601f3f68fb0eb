from fastigpt.cli import main

main()
