from classifiers.evaluate import main

raise SystemExit(main())
